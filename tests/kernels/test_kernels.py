"""The kernels give the bits of torch's operations, and step aside wherever something looks at those operations."""

import copy
import warnings

import brevitas.nn as qnn
import pytest
import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import oracles
from granq_plugin import GranQActPerChannel, GranQActPerChannelStatic, kernels
from granq_plugin import functional as GF
from granq_plugin.kernels import Ahead, Before

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BEFORE = st.sampled_from([
    Before(), Before(relu=True), Before(relu=True, max_val=6.0), Before(min_val=-0.5, max_val=0.7), Before(min_val=0.2),
    Before(relu=True, min_val=0.2), Before(max_val=-0.1), Before(min_val=1.0, max_val=-1.0)])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As oracles.assert_equal, and signs of zero and memory format too."""
    oracles.assert_equal(actual, expected)
    assert actual.stride() == expected.stride()
    differs = torch.signbit(actual) != torch.signbit(expected)
    assert not (differs & ~actual.isnan()).any()


def is_fused(x: torch.Tensor, channel_axis: int, ahead: Ahead) -> bool:
    return kernels._is_fused(x, channel_axis, ahead, *kernels._choose(x, channel_axis))


@st.composite
def tensors(draw, dtypes=DTYPES):
    """``(x, incoming gradient)`` of any layout the kernels know: rows shorter and longer than a vector, few and many channels."""
    spatial = draw(st.sampled_from([(), (1, ), (7, ), (300, ), (1, 1), (3, 3), (8, 8), (7, 9), (2, 3, 4)]))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 17, 40])), *spatial)
    x = torch.from_numpy(draw(oracles.values(shape)))
    poison = draw(st.sampled_from([None, None, float("nan"), float("inf"), -float("inf"), -0.0]))
    if poison is not None:
        x.view(-1)[::draw(st.sampled_from([1, 5, 1000]))] = poison
    x = x.to(draw(st.sampled_from(dtypes)))
    if len(shape) > 3 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    return x, torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def compare(compiled, eager, leaves: tuple, incoming: torch.Tensor) -> None:
    """Outputs and the gradients of all leaves, bit for bit."""
    results = []
    for function in (compiled, eager):
        fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        outputs = function(*fresh)
        outputs = outputs if isinstance(outputs, tuple) else (outputs, )
        results.append((outputs, torch.autograd.grad(outputs[0], fresh, incoming)))
    for a, b in zip(results[0][0], results[1][0]):
        assert_same_bits(a, b)
    for a, b in zip(results[0][1], results[1][1]):
        oracles.assert_equal(a, b)


@pytest.mark.usefixtures("cpp_kernel")
class TestCompiled:

    @given(tensors(), oracles.BIT_WIDTHS, BEFORE)
    @settings(max_examples=150)
    def test_granq(self, drawn, bit_width, before):
        x, incoming = drawn
        assert kernels.backend(x) == "compiled"
        compare(lambda t: kernels.granq(t, bit_width, 1, before), lambda t: GF.granq(before.apply(t), bit_width), (x, ), incoming)
        with torch.no_grad():
            assert_same_bits(kernels.granq(x, bit_width, 1, before).value, GF.granq(before.apply(x), bit_width).value)

    @given(tensors(), st.sampled_from([2, 3, 4, 8]), BEFORE, st.booleans(), st.booleans())
    @settings(max_examples=150)
    def test_affine_quantize_is_brevitas_int_quant(self, drawn, bit_width, before, signed, narrow):
        x, incoming = drawn
        narrow = narrow and signed
        axes = [d for d in range(x.dim()) if d != 1]
        ends = torch.randn(2, *(1 if d in axes else n for d, n in enumerate(x.shape))).to(
            torch.promote_types(x.dtype, torch.float32)).sort(0).values
        scale, zero_point = GF.affine_params(*ends, bit_width, signed)
        limits = GF.integer_limits(bit_width, signed, narrow)
        int_quant = IntQuant(narrow_range=narrow, signed=signed, input_view_impl=Identity())

        def stock(t):
            return int_quant(scale, zero_point, torch.tensor(float(bit_width)), before.apply(t)).to(t.dtype)

        compare(lambda t: kernels.affine_quantize(t, scale, zero_point, limits, 1, before), stock, (x, ), incoming)
        compare(lambda t: GF.affine_quantize(before.apply(t), scale, zero_point, limits), stock, (x, ), incoming)
        if torch.isfinite(x).all():
            integers = GF.quantize_to_integers(before.apply(x), scale, zero_point, bit_width, signed, narrow)
            assert integers.dtype == (torch.int8 if signed else torch.uint8)
            value = kernels.affine_quantize(x, scale, zero_point, limits, 1, before)
            oracles.assert_equal(((integers - zero_point) * scale).to(x.dtype), value)

    @given(tensors([torch.float32, torch.bfloat16, torch.float16]), oracles.BIT_WIDTHS, BEFORE, st.booleans(), st.booleans(),
           st.sampled_from([None, (1, 14)]))
    @settings(max_examples=150)
    def test_batch_norm_and_addition_ahead(self, drawn, bit_width, before, affine, residual, static):
        """Values, scales and the gradients of input, weight, bias and residual are those of torch's operations, bit for bit."""
        x, incoming = drawn
        if x.dim() < 3:
            return
        channels = x.shape[1]
        mean, var, *affine_parameters = torch.randn(4 if affine else 2, channels)
        others = (*affine_parameters, *([torch.randn_like(x)] if residual else []))

        def function(step):
            def run(x, *others):
                weight, bias = others[:2] if affine else (None, None)
                ahead = Ahead(mean, var.square() + 0.1, weight, bias, 1e-5, others[-1] if residual else None)
                return step(x, ahead)
            return run

        if static is None:
            fused = function(lambda x, ahead: kernels.granq(x, bit_width, 1, before, ahead))
            eager = function(lambda x, ahead: GF.granq(before.apply(ahead.apply(x)), bit_width))
        else:
            ends = torch.randn(2, 1, channels, *[1] * (x.dim() - 2)).sort(0).values
            scale, zero_point = GF.affine_params(*ends, 4, False)
            fused = function(lambda x, ahead: kernels.affine_quantize(x, scale, zero_point, static, 1, before, ahead))
            eager = function(lambda x, ahead: GF.affine_quantize(before.apply(ahead.apply(x)), scale, zero_point, static))
        compare(fused, eager, (x, *others), incoming)
        with torch.no_grad():
            first = [r[0] if isinstance(r, tuple) else r for r in (fused(x, *others), eager(x, *others))]
            assert_same_bits(*first)

    def test_what_batch_norm_ahead_falls_back_to(self, monkeypatch):
        """The operations of torch: of other layouts and types, without a kernel, where torch's BatchNorm has other bits."""
        def same(x, ahead):
            oracles.assert_equal(kernels.granq(x, 3, 1, Before(relu=True), ahead).value, GF.granq(ahead.apply(x).relu(), 3).value)

        x = torch.randn(2, 3, 8, 8)
        ahead = Ahead(torch.randn(3), torch.rand(3) + 0.1, torch.randn(3), torch.randn(3), 1e-5)
        assert is_fused(x, 1, ahead) and is_fused(x, -3, ahead)
        transposed, double = x.transpose(2, 3).contiguous().transpose(2, 3), Ahead(*(t.double() for t in ahead[:4]), 1e-5)
        for y, other in ((x, ahead._replace(residual=transposed)), (x, ahead._replace(residual=torch.randn(1))),
                         (x[..., ::2], ahead), (x.double(), double), (x, ahead._replace(weight=torch.randn(6)[::2])),
                         (x, ahead._replace(residual=x.double()))):
            assert not is_fused(y, 1, other)
            same(y, other)
        scale, zero_point = torch.full((1, ), 0.1), torch.zeros(1)
        oracles.assert_equal(kernels.affine_quantize(x, scale, zero_point, (0, 7), 1, Before(), ahead),
                             GF.affine_quantize(ahead.apply(x), scale, zero_point, (0, 7)))
        monkeypatch.setattr(kernels, "_computes_batch_norm", lambda *a: False)
        assert not is_fused(x, 1, ahead)
        monkeypatch.undo()
        monkeypatch.setenv("GRANQ_KERNEL", "eager")
        assert not is_fused(x, 1, ahead)
        same(x, ahead)

    def test_a_batch_norm_of_other_bits_is_found_out(self, monkeypatch):
        """One unit in the last place of every fourth output is enough."""
        apply = Ahead.apply

        def off(self, x):
            y = apply(self, x)
            return torch.where(torch.arange(y.numel()).view_as(y) % 4 == 0, torch.nextafter(y, y + 1), y)

        monkeypatch.setattr(Ahead, "apply", off)
        kernels._computes_batch_norm.cache_clear()
        try:
            assert not kernels._computes_batch_norm(torch.float32, torch.contiguous_format)
        finally:
            kernels._computes_batch_norm.cache_clear()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [17, 64, 300])
    def test_levels_that_are_looked_up(self, dtype, n):
        """All levels, the one too many of a range symmetric around 0, the sign of zero where the offset is -0, offsets that drown
        the levels, one value only."""
        ramp = torch.linspace(0, 1, n)
        x = torch.stack([ramp, ramp - 0.5, 3 * ramp - 1.5, ramp - 0.01, ramp - 1e-6, -ramp, ramp + 1000, ramp - 1e6, 0 * ramp,
                         0 * ramp + 7, ramp * 1e-9, ramp * 1e30, ramp.neg() * 1e38, (ramp - 0.01).round(decimals=1)])
        x = torch.stack([x, x.flip(1)]).to(dtype)
        for bit_width in range(1, 8):
            for before in (Before(), Before(relu=True), Before(min_val=-0.25, max_val=0.75)):
                compare(lambda t: kernels.granq(t, bit_width, 1, before), lambda t: GF.granq(before.apply(t), bit_width),  # noqa: B023
                        (x, ), torch.ones_like(x))

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("width", [256, 257])
    def test_large_tensors(self, memory_format, width):
        """Of 16 MB and more: written past the cache, where a row or the channels are whole lines."""
        x, incoming = (torch.randn(4, 16, 256, width).contiguous(memory_format=memory_format) for _ in range(2))
        scale, zero_point = GF.affine_params(*GF.channel_range(x, per_sample=False), 4)
        before = Before(relu=True)
        compare(lambda t: kernels.granq(t, 4, 1, before), lambda t: GF.granq(t.relu(), 4), (x, ), incoming)
        compare(lambda t: kernels.affine_quantize(t, scale, zero_point, (0, 15), 1, before),
                lambda t: GF.affine_quantize(t.relu(), scale, zero_point, (0, 15)), (x, ), incoming)

    def test_gradient_of_granq_alone_is_the_incoming_tensor(self):
        """No copy is made."""
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        incoming = torch.randn(2, 3, 8, 8)
        assert torch.autograd.grad(kernels.granq(x, 4).value, x, incoming)[0].data_ptr() == incoming.data_ptr()

    def test_second_derivative(self):
        x = torch.randn(2, 3, 5, 5, requires_grad=True)
        results = []
        for y in (kernels.granq(x, 4, 1, Before(relu=True)).value, GF.granq(x.relu(), 4).value):
            grad, = torch.autograd.grad((y**3).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(grad.sum(), x)[0])
        oracles.assert_equal(*results)

    def both_kernels(self, channels):
        scale, zero_point = torch.rand(1, channels, 1, 1) + 0.1, torch.full((1, channels, 1, 1), 3.0)
        before = Before(relu=True)
        yield (lambda t: kernels.granq(t, 4, 1, before).value), (lambda t: GF.granq(t.relu(), 4).value)
        yield (lambda t: kernels.affine_quantize(t, scale, zero_point, (0, 9), 1, before),
               lambda t: GF.affine_quantize(t.relu(), scale, zero_point, (0, 9)))

    def test_batches_of_gradients(self):
        """As of a vectorized Jacobian; NaN where nothing passes stays out."""
        x, incoming = torch.randn(2, 3, 5, 5), torch.randn(4, 2, 3, 5, 5)
        incoming[0] = float("nan")
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for functions in self.both_kernels(3):
                leaf = x.contiguous(memory_format=memory_format).requires_grad_()
                results = [torch.autograd.grad(f(leaf), leaf, incoming, is_grads_batched=True)[0] for f in functions]
                oracles.assert_equal(*results)

    def test_negated_views(self):
        """Whose memory holds the opposite: gradients, scales and what is added."""
        x = torch.randn(2, 3, 5, 5)
        incoming, residual = torch._neg_view(torch.randn_like(x)), torch._neg_view(torch.randn_like(x))
        for functions in self.both_kernels(3):
            compare(*functions, (x, ), incoming)
        scale, zero_point = torch._neg_view(torch.tensor([-0.5, -1, -2])), torch._neg_view(torch.zeros(3))
        oracles.assert_equal(kernels.affine_quantize(x, scale.view(1, 3, 1, 1), zero_point.view(1, 3, 1, 1), (0, 9)),
                             GF.affine_quantize(x, scale.view(1, 3, 1, 1), zero_point.view(1, 3, 1, 1), (0, 9)))
        ahead = Ahead(torch.randn(3), torch.rand(3) + 0.1, torch._neg_view(torch.randn(3)), None, 1e-5)
        for a in (ahead, ahead._replace(weight=torch.randn(3), residual=residual)):
            oracles.assert_equal(kernels.granq(x, 3, 1, Before(), a).value, GF.granq(a.apply(x), 3).value)

    def test_another_default_device_and_type(self, run_python):
        """Decide nothing: in a new process, since answers are kept."""
        code = ("import torch; from granq_plugin import kernels; from granq_plugin import functional as GF\n"
                "from granq_plugin.kernels import Ahead, Before\n"
                "x, r = torch.randn(2, 2, 3, 4, 4); x.requires_grad_(); s, z = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)\n"
                "a = Ahead(torch.randn(3), torch.rand(3) + 0.1, None, None, 1e-5, r)\n"
                "torch.set_default_dtype(torch.float64)\n"
                "for b in (Before(relu=True), Before(min_val=-0.5, max_val=0.5)):\n"
                "    expected = [GF.granq(b.apply(x, a), 4), GF.affine_quantize(b.apply(x), s, z, (0, 3))]\n"
                "    with torch.device('meta'):\n"
                "        actual = [kernels.granq(x, 4, 1, b, a), kernels.affine_quantize(x, s, z, (0, 3), 1, b)]\n"
                "        actual[1].sum().backward()\n"
                "    print(all(map(torch.equal, actual[0], expected[0])), torch.equal(actual[1], expected[1]))\n")
        assert run_python(code).split() == ["True"] * 4

    def test_any_number_of_threads(self):
        x = torch.randn(8, 24, 33, 33)
        expected = GF.granq(x, 4).value
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for t in (x, x.contiguous(memory_format=torch.channels_last)):
                    oracles.assert_equal(kernels.granq(t, 4).value, expected)
        finally:
            torch.set_num_threads(threads)


class TestSteppingAside:

    def test_forward_mode_differentiation(self):
        """A kernel would drop the tangent."""
        x = torch.randn(2, 3, 4, 4)
        assert kernels.backend(x) == "compiled"
        with forward_ad.dual_level():
            assert kernels.backend(x) == "eager"
        assert kernels.backend(x) == "compiled"

    def test_layouts_of_no_kernel(self):
        x = torch.randn(2, 4, 6, 8)
        for t, axis in ((x[..., ::2], 1), (x, 2), (torch.zeros(0, 3, 2, 2), 1), (x.to("meta"), 1), (x.to_sparse(), 1)):
            assert kernels.backend(t, axis) == "eager"
        oracles.assert_equal(kernels.granq(x[..., ::2], 3).value, GF.granq(x[..., ::2], 3).value)
        oracles.assert_equal(kernels.granq(x, 3, 2).value, GF.granq(x, 3, 2).value)

    def test_observers_see_torch_operations(self):
        x = torch.randn(2, 3, 4, 4)
        graph = make_fx(lambda t: kernels.granq(t, 3).value)(x)
        assert any("round" in str(n.target) for n in graph.graph.nodes)
        with warnings.catch_warnings():  # of the check for an empty batch, which becomes a constant
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda t: kernels.granq(t, 3).value, x)
        oracles.assert_equal(traced(2 * x), GF.granq(2 * x, 3).value)
        mapped = torch.func.vmap(lambda t: kernels.granq(t, 3).value)(torch.stack([x, 2 * x]))
        oracles.assert_equal(mapped[1], GF.granq(2 * x, 3).value)
        program = torch.export.export(qnn.QuantReLU(GranQActPerChannel, bit_width=3).eval(), (x, ))
        assert any("round" in str(n.target) for n in program.graph.nodes)

    @pytest.mark.parametrize("quantizer", [GranQActPerChannel, GranQActPerChannelStatic])
    @pytest.mark.parametrize("limit", [None, 0.5])
    def test_hooks_see_what_lies_between(self, quantizer, limit):
        options = {} if limit is None else dict(max_val=limit)
        act = qnn.QuantReLU(quantizer, bit_width=3, **options)
        x = torch.randn(2, 3, 4, 4)
        for _ in range(2):
            act(x)
        act.eval()
        if quantizer is GranQActPerChannelStatic:
            act.act_quant.fused_activation_quant_proxy.tensor_quant.init_scale()
        expected, seen = act(x), []
        twin = copy.deepcopy(act)
        twin.act_quant.fused_activation_quant_proxy.activation_impl.register_forward_hook(lambda m, a, y: seen.append(y))
        oracles.assert_equal(twin(x), expected)
        oracles.assert_equal(seen[0], torch.relu(x))

    def test_static_integers(self):
        act = qnn.QuantReLU(GranQActPerChannelStatic, bit_width=4)
        quantizer, x = act.act_quant.fused_activation_quant_proxy.tensor_quant, torch.randn(2, 3, 4, 4)
        with pytest.raises(RuntimeError, match="not frozen"):
            quantizer.quantize_to_integers(x)
        act(x)
        quantizer.init_scale()
        integers = quantizer.quantize_to_integers(torch.relu(2 * x))
        assert integers.dtype == torch.uint8 and integers.max() == 15
        oracles.assert_equal((integers - act.act_quant.zero_point()) * act.act_quant.scale(), act.eval()(2 * x))
        with pytest.raises(ValueError, match="1 NaN or Inf"):
            quantizer.quantize_to_integers(torch.full((1, 3, 1, 1), 1.0).index_fill(1, torch.tensor([0]), float("nan")))


class TestForcing:

    def test_bad_name(self, monkeypatch):
        monkeypatch.setenv("GRANQ_KERNEL", "fast")
        with pytest.raises(ValueError, match="one of eager, compiled, triton, got 'fast'"):
            kernels.granq(torch.randn(1, 2, 3), 4)

    def test_eager(self, monkeypatch):
        monkeypatch.setenv("GRANQ_KERNEL", "eager")
        assert kernels.backend(torch.randn(1, 2, 3)) == "eager"

    def test_triton_without_gpu(self, monkeypatch):
        monkeypatch.setenv("GRANQ_KERNEL", "triton")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match="GRANQ_KERNEL=triton, but: Triton runs on a GPU, and x is on cpu"):
            kernels.granq(torch.randn(1, 2, 3), 4)


class TestInNetworks:

    @pytest.mark.usefixtures("cpp_kernel")
    def test_memory_of_the_backward(self):
        """ReLU + GranQ keep a bit of each value: nothing of the size of the tensor is saved."""
        x = torch.randn(4, 8, 16, 16, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            y = qnn.QuantReLU(GranQActPerChannel, bit_width=4)(x)
        assert not saved and y.grad_fn.mask.numel() * 8 == x.numel()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_a_step_of_training_is_the_same_without_kernels(self, monkeypatch, memory_format):
        grads = []
        for name in ("eager", ""):
            monkeypatch.setenv("GRANQ_KERNEL", name)
            torch.manual_seed(0)
            net = nn.Sequential(
                qnn.QuantConv2d(3, 8, 3, weight_quant=None), nn.BatchNorm2d(8), qnn.QuantReLU(GranQActPerChannel, bit_width=3),
                qnn.QuantReLU(GranQActPerChannelStatic, bit_width=3, collect_stats_steps=1)).to(memory_format=memory_format)
            x = torch.randn(4, 3, 9, 9).contiguous(memory_format=memory_format)
            for _ in range(3):
                net.zero_grad()
                net(x).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        for a, b in zip(*grads):
            oracles.assert_equal(a, b)
