"""BatchNorm inside the activation's kernel: the same bits, gradients and networks, and only where nobody looks between."""

import copy
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brevitas.core.function_wrapper import FloorSte
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import is_parametrized

import granq_plugin as gq
import networks
import oracles
from granq_plugin import kernels
from granq_plugin.core.static import StaticGranQ
from granq_plugin.core.unit import UnitActivation
from granq_plugin.deploy import fold, prepare
from granq_plugin.deploy.graph import ChannelRescale
from granq_plugin.fusion import BatchNormAct, fuse_batch_norm
from granq_plugin.zero_shot import preset, training, zero_shot_qat

ACT_QUANTS = [gq.GranQActPerChannel, gq.GranQActPerChannelStatic, gq.GranQActPerChannelStatic.let(learned_scale=True)]


@pytest.fixture
def fused_calls(monkeypatch):
    """Shapes that were quantized with a BatchNorm ahead, and whether something was added."""
    calls, is_fused = [], kernels._is_fused

    def spy(x, channel_axis, ahead, *chosen):
        answer = is_fused(x, channel_axis, ahead, *chosen)
        calls.append((tuple(x.shape), ahead.residual is not None, answer))
        return answer

    monkeypatch.setattr(kernels, "_is_fused", spy)
    return calls


def quantized(model, act_quant=gq.GranQActPerChannel):
    """With frozen ranges, if they are static."""
    student = gq.quantize(oracles.randomize_batch_norm(model).eval(), 3, 3, act_quant=act_quant)
    if act_quant is not gq.GranQActPerChannel:
        acts = [m for m in student.modules() if isinstance(m, StaticGranQ)]
        for m in acts:
            m.train()
        student(torch.randn(8, 3, 8, 8))
        for m in acts:
            m.init_scale()
    return student.eval()


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, BatchNormAct)]


def assert_same_function(student, x):
    """Outputs and the gradients of input and parameters, bit for bit."""
    results, incoming = [], torch.randn_like(student(x))
    for model in (student, fuse_batch_norm(student)):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        params = [p for p in student.parameters() if p.numel() and p.requires_grad]
        results.append([y, *torch.autograd.grad(y, [leaf, *params], incoming, allow_unused=True)])
    for a, b in zip(*results):
        assert (a is None) == (b is None)
        if a is not None:
            oracles.assert_equal(a, b)
    with torch.no_grad():
        oracles.assert_equal(student(x), fuse_batch_norm(student)(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("act_quant", ACT_QUANTS)
def test_same_bits_in_a_network_with_residuals(fused_calls, act_quant, memory_format):
    student = quantized(networks.teacher_network(), act_quant)
    x = torch.randn(5, 3, 8, 8).contiguous(memory_format=memory_format)
    assert len(layers_of(fuse_batch_norm(student))) == 3
    assert_same_function(student, x)
    if act_quant is not ACT_QUANTS[2]:
        assert {(residual, fused) for _, residual, fused in fused_calls} == {(False, True), (True, True)}


@pytest.mark.parametrize("name", ["chain", "mobile", "residual", "concat"])
@pytest.mark.parametrize("kernel", ["", "eager"])
def test_same_bits_in_folded_networks(monkeypatch, name, kernel):
    monkeypatch.setenv("GRANQ_KERNEL", kernel)
    model, x = networks.quantized_as("folded", name), networks.images32(2, 3)
    assert any(UnitActivation.suits(layer.act) for layer in layers_of(fuse_batch_norm(model)))
    assert_same_function(model, x)


def test_same_bits_while_a_folded_network_learns():
    """Weights of BatchNorm and layers are computed from parameters: gradients reach these."""
    net = oracles.randomize_batch_norm(networks.teacher_network()).eval()
    images = torch.randn(16, 3, 8, 8)
    model = fold(gq.to_static(prepare(net, images[:1], 4, 4), [images]), images[:1], trainable=True)
    fused = layers_of(fuse_batch_norm(model))
    assert any(is_parametrized(m.norm) for m in fused)
    assert_same_function(model, images)


def test_folded_networks_fuse_their_factors_and_both_branches():
    model = networks.quantized_as("folded", "residual")
    fused = layers_of(fuse_batch_norm(model))
    assert any(isinstance(m.norm, ChannelRescale) for m in fused) and any(isinstance(m.act, qnn.QuantIdentity) for m in fused)


def change_hook(act):
    act.act_quant.fused_activation_quant_proxy.tensor_quant.int_quant.register_forward_hook(lambda *_: None)


def change_constant(act):
    act.act_quant.fused_activation_quant_proxy.tensor_quant.msb_clamp_bit_width_impl.bit_width.value.fill_(2)


def change_rounding(act):
    act.act_quant.fused_activation_quant_proxy.tensor_quant.int_quant.float_to_int_impl = FloorSte()


def change_bits(act):
    act.act_quant.quant_injector = act.act_quant.quant_injector.let(bit_width=2)
    act.act_quant.init_tensor_quant()


@pytest.mark.parametrize("change", [
    change_hook, change_bits, change_constant, change_rounding, lambda act: setattr(act, "return_quant_tensor", True),
    lambda act: setattr(act.act_quant, "disable_quant", True)])
def test_folded_activations_that_became_something_else(change):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = folded(oracles.randomize_batch_norm(net).eval(), torch.randn(8, 3, 8, 8))
    fused, x = fuse_batch_norm(model), torch.randn(2, 3, 8, 8)
    layer = next(layer for layer in layers_of(fused) if isinstance(layer.act, qnn.QuantReLU))
    assert layer._fuses(x, None)
    change(layer.act)
    assert not layer._fuses(x, None)
    with torch.no_grad():
        oracles.assert_equal(fused(x), model(x))


def test_layers_are_not_run_to_see_whether_they_suit():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = folded(oracles.randomize_batch_norm(net).eval(), torch.randn(8, 3, 8, 8))
    act = model.get_submodule("2")
    act.act_quant.skip_create_quant_tensor = True
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        oracles.assert_equal(fuse_batch_norm(model)(x), model(x))
    meta = copy.deepcopy(model).to("meta")
    assert not layers_of(fuse_batch_norm(meta))
    with register_module_forward_hook(lambda *_: pytest.fail("a layer was run")):
        assert fuse_batch_norm(model) is model


def folded(model, x):
    return fold(gq.to_static(prepare(model, x[:1], 4, 4), [x]), x[:1])


def test_every_batch_norm_of_resnet20_and_most_of_mobilenet():
    import zoo
    student = gq.quantize(zoo.get_card("resnet20_cifar10").build(), 4, 4).eval()
    assert len(layers_of(fuse_batch_norm(student))) == 19
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    for name, count in (("resnet18", 17), ("mobilenet_v2", 35)):
        student = gq.quantize(getattr(torchvision.models, name)().eval(), 4, 4)
        fused = fuse_batch_norm(student)
        assert len(layers_of(fused)) == count
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            oracles.assert_equal(fused(x), student(x))
        assert not layers_of(student)


class Sums(nn.Module):
    """Additions of every form: fused where the BatchNorm's output is read by nobody else."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.norm, self.relu, self.form = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), form

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.form == "add":
            return self.relu(y + x)
        if self.form == "other":
            return self.relu(x.add(y))
        if self.form == "in place":
            y += x
            return self.relu(y)
        if self.form == "into the other":
            x = x * 1
            x += y
            return self.relu(x) + x
        if self.form == "read again":
            return self.relu(y + x) + y
        if self.form == "sum read again":
            y = y + x
            return self.relu(y) + y
        if self.form == "alpha":
            return self.relu(torch.add(y, x, alpha=2))
        if self.form == "constant":
            return self.relu(y + 1)
        if self.form == "broadcast":
            return self.relu(y + x.mean(1, keepdim=True))
        if self.form == "two norms":
            return self.relu(y + self.norm(x))
        return self.relu(self.norm(x))


@pytest.mark.parametrize("form, count", [
    ("add", 1), ("other", 1), ("in place", 1), ("into the other", 0), ("read again", 0), ("sum read again", 0), ("alpha", 0),
    ("constant", 0), ("broadcast", 1), ("two norms", 1), ("no sum", 1)])
def test_sums(form, count):
    student = quantized(Sums(form))
    fused = fuse_batch_norm(student)
    assert len(layers_of(fused)) == count and (fused is student) == (not count)
    assert_same_function(student, torch.randn(2, 3, 5, 5))


def net(act_quant=gq.GranQActPerChannel, **options):
    torch.manual_seed(0)
    return oracles.randomize_batch_norm(nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), qnn.QuantReLU(act_quant, bit_width=3, **options))).eval()


class TestWhoeverLooksBetween:
    """sees what there was: fused or not, the answer is the same."""

    x = torch.randn(2, 3, 6, 6)

    def check(self, model, fused_calls, fuses, whole=None):
        expected = model(self.x)
        fused_calls.clear()
        oracles.assert_equal((whole or fuse_batch_norm(model))(self.x), expected)
        assert bool(fused_calls) == fuses

    def test_hooks(self, fused_calls):
        self.check(net(), fused_calls, True)
        seen = []
        for pick in (lambda m: m[1], lambda m: m[2], lambda m: m[2].act_quant,
                     lambda m: m[2].act_quant.fused_activation_quant_proxy,
                     lambda m: m[2].act_quant.fused_activation_quant_proxy.tensor_quant):
            model = net()
            whole = fuse_batch_norm(model)
            expected = model[1](model[0](self.x))
            handle = pick(model).register_forward_hook(lambda m, a, y: seen.append(a[0] if m is not model[1] else y))  # noqa: B023
            self.check(model, fused_calls, False, whole)
            oracles.assert_equal(seen.pop().relu(), expected.relu())
            handle.remove()
            self.check(model, fused_calls, True, whole)

    def test_hooks_of_what_is_traced_through(self, fused_calls):
        """Before and after fusing: they are called."""
        class Own(nn.Module):
            def forward(self, x):
                return 2 * x

        for pick in (lambda m: m, lambda m: m[0], lambda m: m[1]):
            model, seen = nn.Sequential(net(), Own()), []
            whole = fuse_batch_norm(model)
            handle = pick(model).register_forward_hook(lambda m, a, y: seen.append(y))  # noqa: B023
            assert fuse_batch_norm(model) is model
            self.check(model, fused_calls, False, whole)
            assert len(seen) == 2
            handle.remove()
            self.check(model, fused_calls, True, whole)

    def test_training_mode(self):
        for switch in (lambda model, whole: whole.train(), lambda model, whole: model.train(),
                       lambda model, whole: model[1].train()):
            model, twin = net(), net()
            whole = fuse_batch_norm(model)
            switch(model, whole)
            twin[1].train()
            oracles.assert_equal(whole(self.x), twin(self.x))
            oracles.assert_equal(model[1].running_mean, twin[1].running_mean)
            assert not torch.equal(model[1].running_mean, net()[1].running_mean)
            whole.eval()
            assert not any(m.training for m in model.modules())

    def test_branches_of_the_mode_and_optional_arguments(self):
        class Branches(nn.Sequential):
            def forward(self, x, factor=None):
                y = super().forward(x)
                return (y if factor is None else y * factor) + self.training

        model = Branches(*net())
        whole = fuse_batch_norm(model)
        assert whole is not model
        assert not torch.equal(whole(self.x), whole(self.x, 2))
        oracles.assert_equal(whole(self.x, factor=2), model(self.x, 2))
        model.train()
        model[1].eval()
        oracles.assert_equal(whole(self.x), model(self.x))

    def test_quantization_disabled(self, fused_calls):
        model = net()
        whole = fuse_batch_norm(model)
        model[2].act_quant.disable_quant = True
        self.check(model, fused_calls, False, whole)

    def test_check_finite_clamps_and_identities(self, fused_calls):
        self.check(net(gq.GranQActPerChannel.let(check_finite=True)), fused_calls, False)
        self.check(net(max_val=0.7), fused_calls, True)
        model = net()
        model[2] = qnn.QuantIdentity(gq.GranQActPerChannel, bit_width=3)
        self.check(model, fused_calls, True)
        model[2] = qnn.QuantReLU(gq.GranQActPerChannel, bit_width=3, return_quant_tensor=True)
        fused, own = fuse_batch_norm(model)(self.x), model(self.x)
        oracles.assert_equal(fused.value, own.value)
        oracles.assert_equal(fused.scale, own.scale)

    def test_ranges_that_are_still_collected(self):
        results = []
        for fuse in (fuse_batch_norm, lambda m: m):
            model = net(gq.GranQActPerChannelStatic, collect_stats_steps=2)
            model[2].train()
            results.append([fuse(model)(x) for x in (self.x, 2 * self.x, 3 * self.x)])
        for a, b in zip(*results):
            oracles.assert_equal(a, b)

    def test_stock_quantizers_and_other_layers(self):
        for model in (nn.Sequential(nn.BatchNorm2d(3), qnn.QuantReLU(bit_width=3)), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
                      nn.Sequential(nn.InstanceNorm2d(3), qnn.QuantReLU(gq.GranQActPerChannel, bit_width=3)), nn.ReLU()):
            assert fuse_batch_norm(model.eval()) is model

    def test_batch_statistics_in_evaluation(self, fused_calls):
        model = net()
        model[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
        self.check(model, fused_calls, False)

    def test_what_cannot_be_traced(self):
        class Branches(nn.Sequential):
            def forward(self, x):
                return super().forward(x) if x.sum() > 0 else x

        class Draws(nn.Sequential):
            def forward(self, x):
                return super().forward(x) + torch.rand(1)

        for kind in (Branches, Draws):
            model = kind(*net())
            assert fuse_batch_norm(model) is model

    def test_a_failure_leaves_nothing_behind(self):
        model = net()
        whole = fuse_batch_norm(model)
        with pytest.raises(RuntimeError):
            layers_of(whole)[0](torch.randn(2, 7, 3, 3))
        with pytest.raises(ValueError, match="4D input"):
            layers_of(whole)[0](torch.randn(2, 4, 3))
        oracles.assert_equal(model(self.x), net()(self.x))

    def test_global_hooks_and_those_of_the_input(self, fused_calls):
        model, seen = net(), []
        whole = fuse_batch_norm(model)
        handle = register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
        self.check(model, fused_calls, False, whole)
        handle.remove()
        assert seen.count("BatchNorm2d") == 2
        self.check(model, fused_calls, True, whole)
        handle = model[2].input_quant.register_forward_hook(lambda m, a, y: seen.append(a[0]))
        self.check(model, fused_calls, False, whole)
        oracles.assert_equal(seen[-1], seen[-2])

    def test_forwards_put_in_their_place(self, fused_calls):
        for pick in (lambda m: m[1], lambda m: m[2], lambda m: m[2].act_quant, lambda m: m):
            model = net()
            whole, module = fuse_batch_norm(model), pick(model)
            own = module.forward
            module.forward = lambda x: 2 * own(x)  # noqa: B023
            assert not torch.equal(model(self.x), net()(self.x))
            self.check(model, fused_calls, False, whole)
            self.check(model, fused_calls, False)
            del module.forward
            self.check(model, fused_calls, True, whole)

        class Twice(qnn.QuantReLU):
            def forward(self, x):
                return super().forward(2 * x)

        model = net()
        model[2] = Twice(gq.GranQActPerChannel, bit_width=3)
        assert fuse_batch_norm(model) is model

    def test_transforms_of_functions(self, fused_calls):
        model = net()
        whole = fuse_batch_norm(model)
        try:
            expected = torch.func.vmap(lambda t: model(t[None])[0])(self.x)
        except RuntimeError as e:
            pytest.skip(f"this torch cannot do it with Brevitas: {e}")
        oracles.assert_equal(torch.func.vmap(lambda t: whole(t[None])[0])(self.x), expected)
        self.check(model, fused_calls, True, whole)

    def test_threads(self):
        """Each has its own BatchNorm ahead, and its own residual."""
        model = quantized(networks.teacher_network())
        whole, inputs = fuse_batch_norm(model), torch.randn(2, 2, 3, 8, 8)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with torch.no_grad(), ThreadPoolExecutor(2) as pool:
                expected = [model(x) for x in inputs]
                outputs = list(pool.map(torch.no_grad()(lambda i: whole(inputs[i % 2])), range(400)))
        finally:
            sys.setswitchinterval(interval)
        assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(outputs))


class Own(nn.Module):
    """A network of one form or another that a trace, or a BatchNorm computed later, might get wrong."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.norm, self.relu, self.form = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), form
        self.register_buffer("count", torch.ones(()))
        self.add = nn.Identity()
        self.written, self.seen = nn.ReLU(inplace=True), []

    def forward(self, x):
        return getattr(self, self.form.replace(" ", "_"))(x)

    def plain(self, x):
        return self.relu(self.norm(self.conv(x)))

    def buffer(self, x):
        return self.plain(x - self.count)

    def sum_with_itself(self, x):
        y = self.norm(x)
        return self.relu(y + y)

    def sum_with_itself_in_place(self, x):
        y = self.norm(x)
        y += y
        return self.relu(y)

    def module_called_add(self, x):
        return self.relu(self.add(self.norm(x)))

    def input_written_to(self, x):
        x = self.conv(x)
        y = self.norm(x)
        skip = F.relu(x, inplace=True)
        return self.relu(y) + skip

    def input_written_to_by_a_module(self, x):
        x = x * 1
        y = self.norm(x)
        skip = self.written(x)
        return self.relu(y + skip)

    def residual_written_to(self, x):
        skip = x * 1
        y = self.norm(self.conv(x)) + skip
        skip.relu_()
        return self.relu(y) + skip

    def input_written_to_before_the_sum(self, x):
        x = x * 1
        y = self.norm(x)
        x.mul_(2)
        return self.relu(y + x)

    def no_gradients(self, x):
        with torch.no_grad():
            h = self.conv(x)
        return self.relu(self.norm(h)) + x

    def autocast(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.conv(x)
        return self.relu(self.norm(h.float()))

    def dropout(self, x):
        return F.dropout(self.plain(x), 0.5, True)

    def count_calls(self, x):
        self.count += 1
        return self.plain(x) * self.count

    def keep_what_was_seen(self, x):
        self.last = self.plain(x)
        self.seen.append(self.last)
        return self.last

    def python_randomness(self, x):
        return self.plain(x) * random.random()

    def numpy_randomness(self, x):
        return self.plain(x) * (1 if np.random.rand() < 0.5 else 2)  # noqa: NPY002

    def torch_randomness(self, x):
        return self.plain(x) * (1 if torch.rand(()) < 0.5 else 2)

    def type_of_the_input(self, x):
        return self.plain(x * 2 if isinstance(x, torch.Tensor) else x)

    def attribute_of_the_input(self, x):
        return self.plain(getattr(x, "value", x))

    def write_to_statistics(self, x):
        self.norm.running_mean.add_(0.1)
        return self.plain(x)


FORMS = [f.replace("_", " ") for f in vars(Own) if not f.startswith("_") and f != "forward"]
UNFUSED = {"sum with itself", "sum with itself in place", "input written to by a module", "input written to before the sum",
           "no gradients", "autocast", "count calls", "keep what was seen", "write to statistics", "python randomness",
           "numpy randomness", "torch randomness"}


@pytest.mark.parametrize("form", FORMS)
def test_forwards_that_a_trace_might_get_wrong(form):
    """Outputs, gradients, and what the forward leaves behind, call after call, as of a twin that is not fused."""
    torch.manual_seed(0)
    model = oracles.randomize_batch_norm(Own(form)).eval()
    model.relu = qnn.QuantReLU(gq.GranQActPerChannel, bit_width=3)
    if form == "module called add":
        model.add = qnn.QuantIdentity(gq.GranQActPerChannel, bit_width=2)
    twin, state = copy.deepcopy(model), torch.get_rng_state()
    fused = fuse_batch_norm(model)
    assert (fused is model) == (form in UNFUSED) and torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, 3, 5, 5)
    for i in range(4):
        results = []
        for m, parameters in ((fused, model), (twin, twin)):
            torch.manual_seed(i)
            random.seed(i)
            np.random.seed(i)  # noqa: NPY002
            if form.startswith("input written to"):  # whose gradients torch refuses, and rightly
                results.append([torch.no_grad()(m)(x)])
                continue
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            results.append([y, *torch.autograd.grad(y.sum(), [leaf, *parameters.parameters()], allow_unused=True)])
        for a, b in zip(*results):
            assert (a is None) == (b is None)
            if a is not None:
                oracles.assert_equal(a, b)
    assert len(model.seen) == len(twin.seen) and all(map(torch.equal, model.seen, twin.seen))
    for a, b in zip(model.state_dict().values(), twin.state_dict().values()):
        oracles.assert_equal(a, b)


@pytest.mark.parametrize("change", [
    lambda m, f: m.load_state_dict({k: 3 * v for k, v in m.state_dict().items()}, assign=True),
    lambda m, f: (f.double(), m.load_state_dict({k: 3 * v for k, v in m.state_dict().items()})),
    lambda m, f: setattr(m, "conv", nn.Conv2d(3, 3, 1)), lambda m, f: setattr(m, "norm", nn.BatchNorm2d(3).eval())])
def test_changes_of_the_model_afterwards(change):
    model = oracles.randomize_batch_norm(Own("buffer")).eval()
    model.relu = qnn.QuantReLU(gq.GranQActPerChannel, bit_width=3)
    fused, x = fuse_batch_norm(model), torch.randn(2, 3, 5, 5)
    before = fused(x)
    change(model, fused)
    x = x.to(model.count.dtype)
    oracles.assert_equal(fused(x), model(x))
    assert not torch.equal(fused(x), before)


@pytest.mark.parametrize("settings", [{}, dict(feature_loss="features", memory_size=24, replay_steps=1, bf16=True)])
def test_training_is_the_same(monkeypatch, fused_calls, settings):
    """To the last bit; BatchNorm outputs that are distilled are not hidden in a kernel."""
    config = preset("cifar10", image_size=8, batch_size=6, epochs=2, iterations=3, warmup_epochs=1, **settings)
    runs = []
    for fuses in (True, False):
        if not fuses:
            monkeypatch.setattr(training, "fuse_batch_norm", lambda m: m)
        torch.manual_seed(0)
        teacher = networks.teacher_network()
        student = gq.quantize(copy.deepcopy(teacher), 3, 3)
        runs.append(zero_shot_qat(student, teacher, config).student.state_dict())
        assert bool(fused_calls) == (fuses and not settings)
        fused_calls.clear()
    assert runs[0].keys() == runs[1].keys()
    for a, b in zip(runs[0].values(), runs[1].values()):
        oracles.assert_equal(a, b)
