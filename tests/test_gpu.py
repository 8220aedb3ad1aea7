"""What a GPU computes: the kernels bit for bit, and zero-shot QAT, recorded as CUDA graphs or not. Skipped without a GPU."""

import contextlib
import copy

import brevitas.nn as qnn
import pytest
import torch

import granq_plugin as gq
import oracles
from benchmarks import published_loop
from granq_plugin import functional as GF
from granq_plugin import kernels
from granq_plugin.kernels import Ahead, Before
from granq_plugin.zero_shot import Generator, preset, zero_shot_qat
from granq_plugin.zero_shot.graphs import RecordedStep
from granq_plugin.zero_shot.step import ObservedTeacher, generator_step
from granq_plugin.zero_shot.training import Training
from networks import teacher_network
from zoo.card import Preprocessing
from zoo.data import ImageSet
from zoo.evaluate import evaluate

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

LAYOUTS = [
    ((4, 33, 17, 9), None), ((4, 33, 17, 9), torch.channels_last), ((2, 3, 128, 128), None), ((1, 2, 181, 181), None),
    ((1, 5, 181, 181), torch.channels_last), ((64, 100), None), ((3, 7, 300), None), ((8, 64, 7, 7), None), ((4, 20, 14, 14), None),
    ((2, 70, 112, 112), torch.channels_last), ((100, 40, 20, 20), torch.channels_last), ((5, 40, 28, 28), torch.channels_last),
    ((5, 96, 14, 14), torch.channels_last), ((5, 96, 7, 7), torch.channels_last), ((2, 64, 15, 15), torch.channels_last)]
BEFORES = [Before(), Before(relu=True), Before(relu=True, max_val=0.9), Before(min_val=-0.5, max_val=0.7)]


@pytest.fixture
def values(request):
    torch.manual_seed(0)
    (shape, memory_format), dtype = request.param
    x = torch.randn(shape)
    x.view(-1)[5:7] = torch.tensor([float("nan"), float("inf")])
    x[-1, -1] = 0.25  # a dead channel
    return x.to(dtype).contiguous(memory_format=memory_format or torch.contiguous_format)


@pytest.fixture
def ways(monkeypatch):
    """Sets what stands in for Fastest, for launches that are made anew."""
    from granq_plugin.kernels import triton_kernel
    triton_kernel._launch.cache_clear()
    yield lambda fastest: monkeypatch.setattr(triton_kernel, "Fastest", fastest)
    triton_kernel._launch.cache_clear()


every_value = pytest.mark.parametrize(
    "values", [(layout, d) for layout in LAYOUTS for d in (torch.float32, torch.bfloat16, torch.float16)], indirect=True)


def leaves(x):
    return [x.to(device).requires_grad_() for device in ("cuda", "cuda", "cpu")]


@every_value
@pytest.mark.parametrize("before", BEFORES, ids=str)
@pytest.mark.parametrize("bit_width", [2, 3, 8])
def test_dynamic_kernel_is_exact(values, before, bit_width, ways):
    """The same bits as torch's operations, on the GPU and on the CPU, and the same gradients; where there are several ways, of
    each."""
    ways(oracles.every_launch)
    a, b, c = leaves(values)
    assert kernels.backend(a) == "triton"
    actual = kernels.granq(a, bit_width, 1, before)
    incoming = torch.randn(values.shape).to(values)
    actual.value.backward(incoming.cuda())
    for leaf in (b, c):
        expected = GF.granq(before.apply(leaf), bit_width)
        for p, q in zip(actual, expected):
            oracles.assert_equal(p.cpu(), q.cpu())
        expected.value.backward(incoming.to(leaf.device))
        oracles.assert_equal(a.grad.cpu(), leaf.grad.cpu())


@pytest.mark.parametrize("shape, memory_format", [
    ((64, 64, 112, 112), torch.channels_last), ((64, 256, 56, 56), torch.channels_last), ((1, 8, 1024, 1025), torch.channels_last),
    ((64, 30, 224, 224), torch.contiguous_format), ((1, 1, 4000, 4001), torch.contiguous_format)])
@pytest.mark.parametrize("way", ["twice", "kept", "fastest"])
def test_programs_that_share_a_row_agree(shape, memory_format, way, ways):
    """More of them than a GPU runs at a time, again and again; also recorded."""
    if way != "fastest":
        ways(lambda twice, kept: dict(twice=twice, kept=kept)[way])
    torch.manual_seed(0)
    x = (torch.randn(shape, device="cuda") * torch.rand(shape[:2] + (1, 1), device="cuda")).contiguous(memory_format=memory_format)
    expected = GF.granq(x, 4)
    for _ in range(10):
        for p, q in zip(kernels.granq(x, 4), expected):
            assert torch.equal(p, q)
    step = RecordedStep(lambda: kernels.granq(x, 4))
    for _ in range(8):
        actual = step()
    for p, q in zip(actual, expected):
        assert torch.equal(p, q)


@pytest.mark.parametrize("channels", [32, 256])
def test_programs_that_do_not_run_together_end(channels, ways, monkeypatch):
    """More of them than a GPU runs at a time, each with several parts: programs find ranges alone."""
    from granq_plugin.kernels import triton_split
    monkeypatch.setattr(triton_split, "together", lambda *args: 12)
    ways(lambda twice, kept: kept)
    x = torch.randn(64 * 256 // channels, channels, 56, 56, device="cuda").contiguous(memory_format=torch.channels_last)
    for p, q in zip(kernels.granq(x, 4), GF.granq(x, 4)):
        assert torch.equal(p, q)


@every_value
@pytest.mark.parametrize("before", BEFORES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, None])
def test_frozen_kernel_is_exact(values, before, axis):
    """Ranges per channel (of activations and of weights), or one for all."""
    a, b, c = leaves(values)
    assert kernels.backend(a) == "triton"
    ends = torch.rand([n if d == axis else 1 for d, n in enumerate(values.shape)])
    signed = before == Before()
    scale, zero_point = GF.affine_params(-ends if signed else 0.1 - ends, ends, 3, signed)
    limits = GF.integer_limits(3, signed)
    actual = kernels.affine_quantize(a, scale.cuda(), zero_point.cuda(), limits, axis or 0, before)
    incoming = torch.randn(values.shape).to(values)
    actual.backward(incoming.cuda())
    for leaf in (b, c):
        expected = GF.affine_quantize(before.apply(leaf), scale.to(leaf.device), zero_point.to(leaf.device), limits)
        oracles.assert_equal(actual.cpu(), expected.cpu())
        expected.backward(incoming.to(leaf.device))
        oracles.assert_equal(a.grad.cpu(), leaf.grad.cpu())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [7, 20, 56, 90, 112])
def test_batch_norm_ahead(size, residual, dtype, memory_format):
    """Scales are torch's to the last places of a BatchNorm, values to a level, gradients where no value crosses 0."""
    torch.manual_seed(0)
    x, r, incoming = (torch.randn(3, 33, size, size, device="cuda").to(dtype).contiguous(memory_format=memory_format)
                      for _ in range(3))
    mean, var, weight, bias = torch.randn(4, 33, device="cuda")
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, r)[:3 + residual]]
        ahead = Ahead(mean, var.square() + 0.1, *leaves[1:3], 1e-5, leaves[3] if residual else None)
        assert kernels._is_fused(leaves[0], 1, ahead, *kernels._choose(leaves[0], 1))
        y = (kernels.granq(leaves[0], 4, 1, Before(relu=True), ahead) if fused
             else GF.granq(ahead.apply(leaves[0]).relu(), 4))
        results.append((y, torch.autograd.grad(y.value, leaves, incoming)))
    (a, grads), (b, expected) = results
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a.scale, b.scale, rtol=4 * eps, atol=0)
    assert ((a.value - b.value).abs() <= 1.1 * b.scale + 4 * eps * b.value.abs()).all()
    assert ((a.value - b.value).abs() > b.scale / 2).float().mean() < (1e-4 if dtype == torch.float32 else 0.05)
    for g, e in zip(grads, expected):
        assert float((g - e).float().norm()) <= 0.05 * float(e.float().norm()) + 1e-6


@pytest.mark.parametrize("act_quant", [gq.GranQActPerChannel, gq.GranQActPerChannelStatic])
def test_a_network_with_fused_batch_norms(act_quant):
    student = gq.quantize(teacher_network(), 4, 4, act_quant=act_quant).cuda()
    x = torch.randn(64, 3, 8, 8, device="cuda")
    student.train()(x)
    student.eval()
    fused = gq.fuse_batch_norm(student)
    assert fused is not student
    with torch.no_grad():
        a, b = fused(x), student(x)
    assert float((a - b).norm()) <= 0.02 * float(b.norm())


@pytest.mark.parametrize("act_quant", [None, gq.GranQActPerChannel, gq.GranQActPerChannelStatic])
def test_a_recorded_network_counts_as_others(act_quant):
    """Whole batches from a CUDA graph, the last one not; the network is as it was."""
    torch.manual_seed(0)
    network = teacher_network().cuda()
    if act_quant is not None:
        network = gq.quantize(network, 4, 4, act_quant=act_quant).cuda()
        network.train()(torch.randn(64, 3, 8, 8, device="cuda"))
    data = ImageSet(torch.randint(0, 256, (1030, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (1030, )), "memory")
    preprocessing = Preprocessing(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    off, on, again = (evaluate(network, data, preprocessing, 100, "cuda", compile=c) for c in ("off", "cudagraphs", "off"))
    assert (off.correct, off.correct5, off.total) == (again.correct, again.correct5, 1030)
    # a library may choose another convolution while it records
    assert abs(on.correct - off.correct) <= 2 and abs(on.correct5 - off.correct5) <= 2 and on.total == 1030
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("act_quant", [gq.GranQActPerChannel, gq.GranQActPerChannelStatic])
def test_a_brevitas_layer_is_exact(act_quant):
    x = torch.randn(8, 16, 14, 14, device="cuda")
    layer = qnn.QuantReLU(act_quant, bit_width=3).cuda()
    layer(x)
    layer.eval()
    moved = copy.deepcopy(layer).cpu()
    oracles.assert_equal(layer(x).cpu(), moved(x.cpu()))


def test_gradients_are_those_of_the_published_loop():
    """float64, as on the CPU (tests/zero_shot/test_step.py)."""
    torch.manual_seed(0)
    teacher = teacher_network().double().cuda()
    student = gq.quantize(teacher, 3, 3, weight_quant=gq.GranQWeightPerKernel).eval()
    generator, reference = Generator(8, 10).double().cuda(), published_loop.Generator(8, 10).double().cuda()
    reference.load_state_dict(generator.state_dict())
    config = preset("cifar10", image_size=8)
    loop = published_loop.PublishedLoop(copy.deepcopy(teacher), copy.deepcopy(student), reference, config)
    noise, labels = torch.randn(6, 100, dtype=torch.float64).cuda(), torch.randint(10, (6, )).cuda()
    loop.step(noise, labels)
    ours = generator_step(ObservedTeacher(teacher.requires_grad_(False)), student, generator, noise, labels,
                          list(generator.parameters()), list(student.parameters()), config)
    for ours_, theirs in ((ours.generator_grads, loop.generator_grads), (ours.student_grads, loop.student_grads)):
        largest = max(float(g.abs().max()) for g in theirs)
        torch.testing.assert_close(list(ours_), list(theirs), rtol=1e-9, atol=1e-12 * largest)


def training(act_quant, **settings):
    torch.manual_seed(0)
    teacher = teacher_network().cuda().eval()
    student = gq.quantize(teacher, 3, 3, act_quant=act_quant)
    config = preset("cifar10", image_size=8, batch_size=8, epochs=4, iterations=5, warmup_epochs=1, student_lr=1e-3, **settings)
    return Training(student, teacher.requires_grad_(False), config, None)


@pytest.mark.parametrize("act_quant", [
    gq.GranQActPerChannel, gq.GranQActPerChannelStatic.let(range_mode="mse"),
    gq.GranQActPerChannelStatic.let(learned_scale=True)])
@pytest.mark.parametrize("settings", [
    {}, dict(memory_size=100, replay_steps=2, bf16=True), dict(feature_loss="features", ema_decay=0.9), dict(sam_rho=0.05),
    dict(accumulation_steps=2, channels_last=False, memory_size=16, replay_steps=1), dict(feature_loss="attention", low_pass=3.0)])
def test_recorded_steps_train_as_others(act_quant, settings):
    """A step of training recorded as a CUDA graph has the result of the step: networks that trained for as long agree, as far as a
    GPU agrees with itself, and both have moved."""
    runs = []
    for mode in ("off", "off", "cudagraphs"):
        run = training(act_quant, compile=mode, **settings)
        start = [p.detach().clone() for p in run.student.parameters()]
        logs = [{k: float(v) for k, v in run.step().items()} for _ in range(run.config.total_iterations)]
        runs.append((logs, [p.detach() for p in run.student.parameters()], start))
    (first, weights, start), (_, again, _), (recorded, replayed, _) = runs
    assert run._recorded["both"]._graph is not None
    moved = sum(float((a - b).square().sum()) for a, b in zip(weights, start) if a.shape == b.shape) ** 0.5
    own = sum(float((a - b).square().sum()) for a, b in zip(weights, again)) ** 0.5
    other = sum(float((a - b).square().sum()) for a, b in zip(weights, replayed)) ** 0.5
    assert moved > 1e-3
    assert other <= 10 * own + 1e-3 * moved, (moved, own, other)
    assert first[0] == pytest.approx(recorded[0], rel=1e-3)


def test_a_run_resumes(tmp_path):
    config = preset("cifar10", image_size=8, batch_size=8, epochs=4, iterations=5, warmup_epochs=1, compile="cudagraphs",
                    memory_size=50, replay_steps=1, checkpoint_every=5)
    for stop_at in (10, None):
        torch.manual_seed(0)
        teacher = teacher_network().cuda()
        student = gq.quantize(teacher, 3, 3)

        def stop(done, log, stop_at=stop_at):
            if done == stop_at:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            result = zero_shot_qat(student, teacher, config, run_dir=tmp_path / "run", resume=stop_at is None, on_iteration=stop)
    assert len(result.metrics) == 4 and len(result.images) == 50 and result.images.device.type == "cpu"
