"""fold() and bake(): the same function, integers between the layers, and what is refused."""

import copy

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import Int8ActPerTensorFixedPoint, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from granq_plugin import (
    GranQActPerChannelStatic,
    GranQWeightPerChannel,
    GranQWeightPerChannelSymmetric,
    GranQWeightPerKernel,
    quantize,
    to_static,
)
from granq_plugin.deploy import bake, fold
from networks import FOLDABLE, Block, images64, quant_relus, randomized, residual
from zoo.models.cifar_resnet import CifarResNet

every_net = pytest.mark.parametrize("name", FOLDABLE)
SEEDS = st.integers(0, 2**31 - 1)


def static_model(name, seed=0, weight_bit_width=None, act_bit_width=4, **options):
    model = randomized(FOLDABLE[name](), seed)
    options.setdefault("weight_quant", GranQWeightPerChannelSymmetric)
    return to_static(quantize(model, weight_bit_width, act_bit_width, **options), [images64(seed + 1, 16)])


def outputs(model, x):
    y = model(x)
    return torch.cat([o.flatten(1) for o in y], 1) if isinstance(y, tuple) else y


def assert_same_function(a, b, x, tolerance=1e-12):
    with torch.no_grad():
        y, z = outputs(a, x), outputs(b, x)
    assert y.std() > 0  # a dead network would agree with anything
    assert (y - z).abs().max() <= tolerance * y.abs().max()


def weight_layer_inputs(model, x):
    """Name -> input of every convolution and linear layer."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0])))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@every_net
@settings(max_examples=12)
@given(seed=SEEDS, bits=st.integers(1, 8))
def test_folding_keeps_the_function(name, seed, bits):
    static = static_model(name, seed, act_bit_width=bits)
    folded = fold(static, images64(0, 1))
    assert_same_function(static, folded, images64(seed + 2))
    for relu in quant_relus(folded).values():
        proxy = relu.act_quant
        assert proxy.scale().shape == () and proxy.scale() == 1 and proxy.zero_point() == 0 and not proxy.is_signed
        assert proxy.bit_width() == bits


@every_net
def test_layers_behind_a_quantizer_read_integers(name):
    """All but the first layer, those behind an average pool, and linear bottlenecks, which the paper's placement leaves float."""
    static = static_model(name)
    is_float = dict(chain="0 4", without_norm="0 7", mobile="0 4.body.0 5.body.0 6 11", residual="0 7.conv1 10",
                    concat="squeeze", consumers="conv fc1", mlp="1")[name].split()
    x = images64(3)
    read = weight_layer_inputs(fold(static, x), x)
    assert {n for n, v in read.items() if not torch.equal(v, v.round())} == set(is_float)
    integers = torch.cat([v.flatten() for n, v in read.items() if n not in is_float])
    assert integers.min() == 0 and integers.max() == 15
    unfolded = weight_layer_inputs(static, x)
    assert all(not torch.equal(unfolded[n], unfolded[n].round()) for n in read)


@every_net
def test_weights_are_quantized_behind_the_scales(name):
    """The layers' inputs times their quantized weights, by hand: weight * s, then quantized, and not the reverse."""
    static, x = static_model(name, weight_bit_width=4), images64(3)
    folded = fold(static, x)
    changed = 0
    for layer_name, layer in folded.named_modules():
        if isinstance(layer, qnn.QuantConv2d | qnn.QuantLinear):
            old = static.get_submodule(layer_name)
            quantized, integers = layer.quant_weight(), layer.quant_weight().int()
            assert integers.abs().max() <= 7 and torch.allclose(quantized.value, integers * quantized.scale, atol=0)
            ratio = layer.weight / old.weight
            requantized = old.weight_quant(old.weight * ratio)
            torch.testing.assert_close(quantized.value, requantized.value)
            changed += not torch.allclose(old.quant_weight().value * ratio, quantized.value)
    assert changed


def test_dead_channels_and_first_layers_without_norm():
    """All-zero ranges have a clamped scale: finite weights, and the same function."""
    model = randomized(FOLDABLE["without_norm"](), 0)
    model[0].weight.data[2] = 0
    model[0].bias.data[2] = -1
    static = to_static(quantize(model, None, 4), [images64(1)])
    assert static[1].act_quant.scale()[0, 2] < 1e-8
    folded = fold(static, images64(2))
    assert all(torch.isfinite(t).all() for t in folded.state_dict().values())
    assert_same_function(static, folded, images64(2))


def test_identity_shortcuts_get_a_rescale_and_convolution_shortcuts_do_not():
    for c_out, stride, rescales in ((4, 1, 1), (8, 2, 0)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(4, c_out, stride), nn.Conv2d(c_out, 2, 3))
        static = to_static(quantize(randomized(model, 1), None, 3), [images64(0)])
        folded = fold(static, images64(0))
        found = [m for n, m in folded.named_modules() if n.startswith("rescale")]
        assert len(found) == rescales and all(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.eps == 0 for m in found)
        if found:
            s_in, s_out = static[2].act_quant.scale().flatten(), static[3].relu2.act_quant.scale().flatten()
            torch.testing.assert_close(found[0].weight, (s_in.double() / s_out), rtol=1e-12, atol=0)
        assert_same_function(static, folded, images64(5))


def test_a_signed_quantizer_shared_by_both_branches():
    """The residual addition that FINN takes: integers of one unit on both branches."""

    class Shared(Block):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.branch = qnn.QuantIdentity(
                act_quant=GranQActPerChannelStatic, bit_width=5, signed=True, narrow_range=True, range_mode="minmax")

        def forward(self, x):
            body = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
            self.operands = self.branch(body), self.branch(self.short(x))
            return self.relu2(self.operands[0] + self.operands[1])

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Shared(4, 4), Shared(4, 6, 2), nn.Flatten(), nn.Linear(96, 3))
    model = randomized(model, 3)
    for name in [n for n, m in model.named_modules() if isinstance(m, nn.ReLU)]:
        model.set_submodule(name, qnn.QuantReLU(act_quant=GranQActPerChannelStatic, bit_width=4))
    model.train()
    for seed in range(2):
        with torch.no_grad():
            model(images64(seed))
    for module in model.modules():
        if hasattr(module, "init_scale"):
            module.init_scale()
    model.eval()
    folded = fold(model, images64(0))
    assert_same_function(model, folded, images64(5))
    adds = [n for n in folded.graph.nodes if "add" in n.name]
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    Recorder(folded).run(images64(5))
    assert len(adds) == 2
    for add in adds:
        for operand in add.all_input_nodes:
            assert torch.equal(values[operand], values[operand].round()) and values[operand].abs().max() <= 15
        assert min(values[operand].min() for operand in add.all_input_nodes) < 0
    shared = folded.get_submodule("2.branch").act_quant
    assert shared.is_signed and shared.is_narrow_range and shared.scale() == 1 and shared.zero_point() == 0


@pytest.mark.parametrize("weight_quant", [GranQWeightPerChannel, GranQWeightPerKernel, Int8WeightPerChannelFloat])
def test_other_weight_quantizers(weight_quant):
    static = static_model("residual", weight_bit_width=12, act_bit_width=8, weight_quant=weight_quant)
    folded = fold(static, images64(0))
    assert_same_function(static, folded, images64(2), 0.05)
    trainable = fold(static, images64(0), trainable=True)
    assert_same_function(trainable, folded, images64(2), 0)
    assert_same_function(bake(trainable), folded, images64(2), 0)


def test_stock_quantizers_keep_their_real_scale():
    model = quantize(
        randomized(residual(), 0), None, 4, input_bit_width=8, input_quant=Int8ActPerTensorFixedPoint,
        overrides={"3.relu2": {"act_quant": Uint8ActPerTensorFloat, "act_bit_width": 6}})
    static = to_static(model, [images64(1, 16)])
    folded = fold(static, images64(0))
    assert_same_function(static, folded, images64(2))
    kept = folded.get_submodule("3.relu2").act_quant
    assert torch.equal(kept.scale(), static[3].relu2.act_quant.scale()) and kept.scale() != 1
    assert folded.get_submodule("0").input_quant.is_quant_enabled


def test_a_copy_is_folded_unless_inplace():
    static, x = static_model("chain", weight_bit_width=4), images64(2)
    before, weight = static(x), static[4].weight
    modes = {n: m.training for n, m in static.named_modules()}
    folded = fold(static, x)
    assert torch.equal(static(x), before) and {n: m.training for n, m in static.named_modules()} == modes
    y = folded(x)
    again = fold(static, x, inplace=True)
    assert again.get_submodule("4").weight is weight and torch.equal(again(x), y)


@pytest.mark.parametrize("training", [False, True])
def test_modes_are_kept(training):
    static = static_model("chain").train(training)
    static[1].eval()
    folded = fold(static, images64(0))
    assert folded.training == training and folded.get_submodule("6").training == training
    assert folded.get_submodule("2").training == training and not folded.get_submodule("1").training


def test_float32_and_the_trained_scale():
    """The quantizer's own learned scale is folded as it stands."""
    model = randomized(residual(), 0).float()
    static = to_static(
        quantize(model, None, 6), [images64(1, 16).float()], act_quant=GranQActPerChannelStatic.let(learned_scale=True))
    static[2].act_quant.fused_activation_quant_proxy.tensor_quant.learned_scale.data.mul_(0.7)
    folded, x = fold(static, images64(0).float()), images64(2).float()
    assert folded(x).dtype == torch.float32
    same = (outputs(static, x) - outputs(folded, x)).abs().amax(1) <= 1e-4
    assert same.float().mean() >= 0.5  # a value at a rounding boundary may fall on the other side


def test_padding_shortcuts_keep_the_function():
    """Padded channels hold zeros, whatever their unit."""
    static = to_static(quantize(randomized(CifarResNet(8, shortcut="A"), 0), None, 4), [images64(1, 16)])
    folded = fold(static, images64(0, 1))
    assert_same_function(static, folded, images64(2))
    assert all(torch.isfinite(t).all() for t in folded.state_dict().values())


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_torchvision_networks(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision (zoo extra) is not installed")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    static = to_static(quantize(randomized(models.get_model(name, weights=None), 0), None, 4), [x])
    assert_same_function(static, fold(static, x[:1]), x)


# --- trainable


@every_net
def test_trainable_and_baked_are_the_folded_model_bit_for_bit(name):
    static, x = static_model(name, weight_bit_width=4), images64(2)
    folded, trainable = fold(static, x), fold(static, x, trainable=True)
    baked = bake(trainable)
    for model in (trainable, baked):
        assert torch.equal(outputs(model, x), outputs(folded, x))
    assert {n: v.tolist() for n, v in baked.state_dict().items() if v is not None} == {
        n: v.tolist() for n, v in folded.state_dict().items()}
    assert not any(torch.nn.utils.parametrize.is_parametrized(m) for m in baked.modules())
    assert torch.equal(outputs(trainable, x), outputs(folded, x))  # baking a copy leaves it alone
    assert bake(trainable, inplace=True) is trainable and torch.equal(outputs(trainable, x), outputs(folded, x))


@pytest.mark.parametrize("name, training", [(n, t) for n in FOLDABLE for t in (False, True) if (n, t) != ("consumers", True)])
def test_trainable_gradients_are_those_of_the_unfolded_model(name, training):
    """In evaluation mode, and with the batch statistics of training mode, where no batch normalization reads integers (their eps
    does not scale with them). Dropout aside, and ReLU6: of what a quantizer rounds to its last level, it lets nothing through
    above 6."""
    model = randomized(FOLDABLE[name](), 0)
    for relu6 in [n for n, m in model.named_modules() if isinstance(m, nn.ReLU6)]:
        model.set_submodule(relu6, nn.ReLU())
    static = to_static(quantize(model, None, 6), [images64(1, 16)])
    trainable = fold(static, images64(2), trainable=True)
    for model in (static, trainable):
        model.train(training)
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.eval()
        outputs(model, images64(5, 8)).square().sum().backward()
    expected = {n: p.grad for n, p in static.named_parameters()}
    got = {n.replace("parametrizations.", "").replace(".original", ""): p.grad for n, p in trainable.named_parameters()
           if p.requires_grad}
    assert {n: g for n, g in got.items() if n not in expected}.keys() <= {"bn.weight", "bn.bias"}  # affine=False became affine
    for n, gradient in expected.items():
        assert (got[n] - gradient).abs().max() <= 1e-9 * max(1, gradient.abs().max()), n


def test_training_reduces_the_distance_to_the_float_teacher_and_bakes_to_what_was_trained():
    teacher = randomized(FOLDABLE["residual"](), 0).float()
    static = to_static(quantize(teacher, 3, 3, weight_quant=GranQWeightPerChannelSymmetric), [images64(1, 32).float()])
    student = fold(static, images64(0).float(), trainable=True).train()
    for m in student.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    x = images64(7, 64).float()
    with torch.no_grad():
        target = teacher(x).softmax(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.kl_div(student(x).log_softmax(1), target, reduction="batchmean")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.5 * losses[0]
    rescales = {n: m for n, m in student.named_modules() if n.startswith("rescale")}
    assert rescales and all((m.running_mean == 0).all() and (m.running_var == 1).all() for m in rescales.values())
    student.eval()
    deployed = bake(student)
    assert torch.equal(deployed(x), student(x))
    for relu in quant_relus(deployed).values():
        assert relu.act_quant.scale() == 1


def test_trainable_models_are_copied_saved_and_loaded(tmp_path):
    static, x = static_model("residual", weight_bit_width=4), images64(2)
    trainable = fold(static, x, trainable=True)
    trainable(x).square().sum().backward()
    torch.optim.SGD(trainable.parameters(), lr=0.1).step()
    torch.save(trainable.state_dict(), tmp_path / "model.pt")
    other = fold(static, x, trainable=True)
    assert not torch.equal(other(x), trainable(x))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), trainable(x))
    copied = copy.deepcopy(trainable)
    bake(copied, inplace=True)
    assert torch.equal(copied(x), trainable(x))
    folded = fold(static, x)
    folded.load_state_dict(copied.state_dict())
    assert torch.equal(folded(x), trainable(x))


def test_frozen_parameters_stay_frozen():
    static = static_model("chain")
    static[4].weight.requires_grad_(False)
    trainable = fold(static, images64(0), trainable=True)
    trainable(images64(1)).sum().backward()
    assert trainable.get_submodule("4").parametrizations.weight.original.grad is None
    assert not bake(trainable).get_submodule("4").weight.requires_grad


# --- what cannot be folded


def calibrated(model):
    return to_static(quantize(randomized(model, 0), None, 4), [images64(1, 8)])


class Between(nn.Module):
    """``between(activation)`` between a ReLU and the layer behind it."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.relu, self.after, self.between = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), between

    def forward(self, x):
        return self.after(self.between(self.relu(self.conv(x))))


@pytest.mark.parametrize("between, message", [
    (torch.sigmoid, r"'sigmoid' \(function sigmoid\): it cannot take the scale of 'relu' \(QuantReLU\)"),
    (lambda x: x + 1, r"'add' \(function add\)"),
    (lambda x: x * x, r"'mul' \(function mul\)"),
    (lambda x: x * x.mean(), "'mean'.*adds up channels of different scales"),
    (lambda x: nn.functional.pad(x, (1, 1), value=2.0), "'pad'"),
    (lambda x: x.softmax(1), r"'softmax' \(method softmax\)"),
    (nn.GroupNorm(2, 4), r"'between' \(GroupNorm\)"),
    (nn.ReLU6(), None),
    (lambda x: x.transpose(1, 2), r"'after' \(Conv2d\): the scales of its input are not one for each channel on axis 1"),
    (lambda x: x + x.transpose(2, 3), None),
    (lambda x: x + x.flip(1), r"'flip' \(method flip\)"),
    (lambda x: x + x.reshape(x.shape), None),
    (lambda x: x + x, None),
    (lambda x: x + x.permute(0, 2, 3, 1).reshape(x.shape), r"'add' \(function add\): its operands have different scales \(of 're"),
])
def test_operations_between_a_quantizer_and_the_next_layer(between, message):
    model = Between(between)
    if message and "axis 1" in message:
        model.after = nn.Conv2d(6, 2, 1)
    if message is None:  # these are no obstacle
        x = images64(2)
        static = calibrated(model)
        assert_same_function(static, fold(static, x), x)
        return
    with pytest.raises(ValueError, match="cannot fold at .*" + message):
        fold(calibrated(model), images64(0))


def test_dynamic_uncalibrated_and_unquantized_models_are_refused():
    model, x = randomized(FOLDABLE["chain"](), 0), images64(0)
    with pytest.raises(ValueError, match=r"cannot fold '2' \(QuantReLU\): its act_quant has dynamic ranges.*to_static"):
        fold(quantize(model), x)
    with pytest.raises(ValueError, match=r"cannot fold '2' \(QuantReLU\): it has no ranges yet"):
        fold(quantize(model, act_quant=GranQActPerChannelStatic), x)
    collecting = quantize(model, act_quant=GranQActPerChannelStatic).train()
    collecting(x)
    with pytest.raises(ValueError, match=r"cannot fold '2' \(QuantReLU\): its ranges are still being collected"):
        fold(collecting, x)
    with pytest.raises(ValueError, match="no static GranQ activation quantizer"):
        fold(model, x)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        fold("model", x)
    with pytest.raises(TypeError, match="example_input must be a tensor or a tuple of tensors, got int"):
        fold(calibrated(FOLDABLE["chain"]()), 3)
    with pytest.raises(ValueError, match=r"cannot run on example_input float\d+ \[1, 5, 8, 8\]"):
        fold(calibrated(FOLDABLE["chain"]()), torch.zeros(1, 5, 8, 8).double())
    with pytest.raises(ValueError, match="already folded"):
        fold(fold(calibrated(FOLDABLE["chain"]()), x, trainable=True), x)
    with pytest.raises(ValueError, match=r"no trainable scales to bake: .*trainable=False\), has them in its weights"):
        bake(fold(calibrated(FOLDABLE["chain"]()), x))


def test_asymmetric_ranges_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), qnn.QuantIdentity(act_quant=GranQActPerChannelStatic, bit_width=4))
    model.double().train()(images64(0))
    model[1].act_quant.fused_activation_quant_proxy.tensor_quant.init_scale()
    with pytest.raises(ValueError, match=r"cannot fold '1' \(QuantIdentity\): 4 of 4 channels have a zero point that is not 0"):
        fold(model.eval(), images64(0))


def test_quantizers_inside_of_layers_and_limits_are_refused():
    x = images64(0)
    static = to_static(quantize(randomized(FOLDABLE["chain"](), 0), None, 4, input_bit_width=8), [x])
    with pytest.raises(ValueError, match=r"cannot fold '0' \(QuantConv2d\): its input_quant is per channel.*in front of"):
        fold(static, x)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), qnn.QuantHardTanh(
        act_quant=GranQActPerChannelStatic, bit_width=4, signed=True, narrow_range=True))
    model.double().train()(x)
    model[1].act_quant.fused_activation_quant_proxy.tensor_quant.init_scale()
    assert_same_function(model.eval(), fold(model, x), x)  # no level lies beyond its limits
    static = to_static(quantize(randomized(FOLDABLE["consumers"](), 0), None, 4), [x])
    static.relu.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.running_max.fill_(7.0)
    with pytest.raises(ValueError, match=r"cannot fold 'relu' \(QuantReLU\): its limits \(None, 6.0\) cut off levels"):
        fold(static, x)


def test_layers_called_twice_and_shared_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.relu1, self.relu2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.conv(self.relu2(self.conv(self.relu1(self.first(x)))))

    with pytest.raises(ValueError, match=r"cannot fold 'conv' \(Conv2d\): it is called at 2 places whose scales differ"):
        fold(calibrated(Twice()), images64(0))
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    static = calibrated(tied)
    static[4].weight = static[2].weight
    before = static(images64(0))
    with pytest.raises(ValueError, match="cannot fold '2': it shares its weight with '4'"):
        fold(static, images64(0), inplace=True)
    assert torch.equal(static(images64(0)), before)  # nothing half done


def test_learned_weight_scales_and_untraceable_models_are_refused():
    static = static_model("chain", weight_bit_width=4, weight_quant=Int8WeightPerChannelFloat.let(
        scaling_impl_type="parameter_from_stats"))
    with pytest.raises(ValueError, match="cannot fold '4': its weight quantizer has learned scales"):
        fold(static, images64(0))

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = FOLDABLE["chain"]()

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else self.net(-x)

    with pytest.warns(UserWarning, match="cannot be traced"):
        static = calibrated(Branching())
    with pytest.raises(ValueError, match="the model cannot be traced, so its scales cannot be followed"):
        fold(static, images64(0))
