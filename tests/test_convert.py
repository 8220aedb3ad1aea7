"""quantize() on networks of many shapes."""

import warnings

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.quant import Int8ActPerTensorFixedPoint, Uint8ActPerTensorFloat
from torch import nn

from granq_plugin import (
    GranQActPerChannel,
    GranQActPerChannelStatic,
    GranQWeightPerChannelSymmetric,
    GranQWeightPerKernel,
    calibrate,
    functional,
    quantize,
    to_static,
)
from granq_plugin.core.proxy import GranQDynamicActProxy
from networks import FunctionalReLU, SharedReLU, image, quant_relus, sequential


class Untraceable(nn.Module):
    """Control flow that depends on data."""

    def __init__(self, relu=True):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 4), nn.ReLU() if relu else nn.GELU(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(self.act(x)) if x.sum() > 0 else self.fc2(self.act(-x))


def has_quantizer(model):
    return any(isinstance(m, QuantProxyFromInjector) for m in model.modules())


@pytest.mark.parametrize("build, count", [(sequential, 2), (SharedReLU, 2), (FunctionalReLU, 4)])
def test_every_relu_call_gets_its_own_quantizer_and_the_float_model_is_untouched(build, count):
    model = build().eval()
    before = model(image())
    quantized = quantize(model, 3, 4)
    relus = quant_relus(quantized)
    assert len(relus) == count and len({id(m.act_quant) for m in relus.values()}) == count
    assert all(m.act_quant.bit_width() == 4 for m in relus.values())
    assert not has_quantizer(model)
    assert torch.equal(model(image()), before)
    assert not torch.equal(quantized(image()), before)


def test_the_result_equals_the_paper_s_formula_by_hand():
    model = sequential().eval()
    y = image()
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            weight = functional.granq(layer.weight, 3).value
            y = F.conv2d(y, weight, layer.bias, groups=layer.groups)
        elif isinstance(layer, nn.Linear):
            y = F.linear(y, functional.granq(layer.weight, 3).value, layer.bias)
        elif isinstance(layer, (nn.ReLU, nn.ReLU6)):
            y = functional.granq(layer(y), 4).value
        else:
            y = layer(y)
    assert torch.equal(quantize(model, 3, 4, weight_quant=GranQWeightPerKernel)(image()), y)


@pytest.mark.parametrize("build", [sequential, SharedReLU, FunctionalReLU])
def test_nothing_quantized_is_the_float_model_exactly(build):
    model = build().eval()
    quantized = quantize(model, None, None)
    assert torch.equal(quantized(image()), model(image()))
    assert not has_quantizer(quantized)


def test_parameter_names_and_values_are_kept():
    for model in (sequential(), SharedReLU(), FunctionalReLU()):
        assert all(torch.equal(v, quantize(model).state_dict()[k]) for k, v in model.state_dict().items())


def test_class_mode_and_gradients_are_kept():
    model = sequential().train()
    quantized = quantize(model)
    assert type(quantized) is nn.Sequential and quantized.training and quantized[2].training
    assert not quantize(model.eval())[2].training
    quantized(image()).sum().backward()
    assert all(p.grad is not None for p in quantized.parameters())


def test_inplace_converts_the_model_itself():
    model = sequential()
    weight = model[0].weight
    assert quantize(model, inplace=True) is model
    assert model[0].weight is weight and isinstance(model[0], qnn.QuantConv2d)


@pytest.mark.parametrize("build", [sequential, SharedReLU, FunctionalReLU])
@pytest.mark.parametrize("act_quant", [GranQActPerChannel, GranQActPerChannelStatic, Uint8ActPerTensorFloat])
def test_quantizers_are_on_the_device_of_the_model(build, act_quant):
    """The meta device shows it without an accelerator."""
    quantized = quantize(build().to("meta"), act_quant=act_quant, input_bit_width=8)
    tensors = {n: t.device.type for n, t in [*quantized.named_parameters(), *quantized.named_buffers()]}
    assert tensors and set(tensors.values()) == {"meta"}
    if act_quant is GranQActPerChannel:
        swapped = quantize(build(), input_bit_width=8)
        calibrate._swap_dynamic_proxies(swapped.to("meta"), GranQActPerChannelStatic)
        assert {t.device.type for t in swapped.buffers()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    quantized = quantize(sequential().to(dtype).eval())
    for model in (quantized, to_static(quantized, [image().to(dtype)])):
        y = model(image().to(dtype))
        assert y.dtype == dtype and torch.isfinite(y).all()


def test_frozen_and_tied_parameters_stay_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    quantized = quantize(model)
    assert quantized[2].weight is quantized[0].weight and not quantized[0].bias.requires_grad
    assert len(list(quantized.parameters())) == 3


def test_padding_modes_are_kept():
    for mode in ("zeros", "reflect", "replicate", "circular"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode, dilation=1, stride=2), nn.ReLU())
        torch.testing.assert_close(quantize(model, 16, 16)(image()), model(image()), rtol=0, atol=1e-3)


def test_first_and_last_layer_go_by_execution():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu, self.left, self.right = nn.Linear(4, 2), nn.ReLU(), nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.relu(self.left(x) + self.right(x)))

    quantized = quantize(Reversed(), first_layer_bit_width=8, last_layer_bit_width=6, input_bit_width=7)
    assert type(quantized) is Reversed
    assert quantized.left.weight_quant.bit_width() == 8 and quantized.fc.weight_quant.bit_width() == 6
    assert quantized.left.input_quant.bit_width() == quantized.right.input_quant.bit_width() == 7
    assert not quantized.fc.input_quant.is_quant_enabled


def test_computed_weights_stay_float_and_are_reported():
    from torch.nn.utils import parametrizations, weight_norm
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.warns(UserWarning, match="stay float: 2"):
        quantize(model)(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_style = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="cannot be copied.*inplace=True"):
        quantize(old_style)
    with pytest.warns(UserWarning, match="stay float: 2"):
        quantize(old_style, inplace=True)(torch.randn(2, 4))


def test_a_failing_conversion_in_place_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        quantize(model, inplace=True, overrides={
            "2": {"weight_quant": GranQWeightPerChannelSymmetric, "weight_bit_width": 1}})
    assert not has_quantizer(model) and type(model[0]) is nn.Linear


def test_a_quantized_network_compiles_bit_exactly(exact_compiler):
    model = quantize(sequential().eval())
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(image()), model(image()))


def test_a_layer_registered_twice_stays_one_layer():
    linear = nn.Linear(4, 4)
    quantized = quantize(nn.Sequential(linear, nn.ReLU(), linear, nn.ReLU()))
    assert quantized[0] is quantized[2] and isinstance(quantized[0], qnn.QuantLinear)


def test_relu6_keeps_its_limit():
    quantized = quantize(nn.Sequential(nn.Linear(2, 2), nn.ReLU6()), 8, 8)
    assert quantized[1](torch.tensor([[0., 3., 60.]])).max() <= 6.001


def test_overrides_first_and_last_layer_and_input():
    quantized = quantize(
        sequential(), 4, 4, first_layer_bit_width=8, last_layer_bit_width=6, input_bit_width=7,
        input_quant=Int8ActPerTensorFixedPoint,
        overrides={"3": {"weight_bit_width": 2, "weight_quant": GranQWeightPerChannelSymmetric}, "4": None,
                   "[26]": {"act_bit_width": 5, "weight_bit_width": 3}})
    assert quantized[0].weight_quant.bit_width() == 8
    assert not isinstance(quantized[0].input_quant, GranQDynamicActProxy)
    assert quantized[0].input_quant.bit_width() == 7 and not quantized[3].input_quant.is_quant_enabled
    assert quantized[3].weight_quant.bit_width() == 2 and quantized[3].weight_quant.is_signed
    assert quantized[2].act_quant.bit_width() == 5
    assert type(quantized[4]) is nn.ReLU6
    assert quantized[6].weight_quant.bit_width() == 3  # a pattern wins over last_layer_bit_width
    quantized.eval()(image())


def test_stock_quantizers_can_be_used():
    quantized = quantize(sequential(), act_quant=Uint8ActPerTensorFloat)
    quantized(image())
    assert quantized[2].act_quant.scale().numel() == 1


def test_an_untraceable_model_is_converted_by_modules_with_a_warning():
    with pytest.warns(UserWarning, match="cannot be traced"):
        quantized = quantize(Untraceable())
    assert isinstance(quantized.act, qnn.QuantReLU) and isinstance(quantized.fc1, qnn.QuantLinear)
    with pytest.raises(ValueError, match="no ReLU module and cannot be traced"):
        quantize(Untraceable(relu=False))


def test_layers_that_stay_float_are_reported():
    class MyLinear(nn.Linear):
        pass

    with pytest.warns(UserWarning, match="1 weight layers .* stay float: 2"):
        quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), MyLinear(4, 4)))
    encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.TransformerEncoderLayer(4, 1, 8, batch_first=True))
    with pytest.warns(UserWarning, match="3 weight layers inside attention.* stay float: 2.self_attn.out_proj, 2.linear1"):
        assert type(quantize(encoder)[2].linear1) is nn.Linear  # its fast path would read the float weight
    with pytest.warns(UserWarning, match="no ReLU"):
        quantize(nn.Sequential(nn.Linear(4, 4), nn.SiLU()))


@pytest.mark.parametrize("kwargs, error, message", [
    (dict(weight_bit_width=0), ValueError, "whole number from 1 to 16, got 0"),
    (dict(act_bit_width=-1), ValueError, "got -1"),
    (dict(act_bit_width=2.5), ValueError, "got 2.5"),
    (dict(first_layer_bit_width="four"), TypeError, "got 'four'"),
    (dict(input_bit_width=0), ValueError, "got 0"),
    (dict(overrides={"nothing*": None}), ValueError, r"'nothing\*' matches no layer; layers are: 0, 3, 6, 2, 4"),
    (dict(overrides={"0": {"bits": 3}}), ValueError, "unknown setting 'bits'; allowed: weight_bit_width"),
    (dict(overrides=["0"]), TypeError, r"must be a dict of name patterns to settings, got \['0'\]"),
    (dict(overrides={1: None}), TypeError, "patterns are layer names, got 1"),
    (dict(overrides={"0": 3}), TypeError, "must map to a dict or None, got 3"),
    (dict(overrides={"0": {"weight_bit_width": 99}}), ValueError, "got 99"),
    (dict(weight_bit_width=1, weight_quant=GranQWeightPerChannelSymmetric), ValueError, "at least 2, got 1"),
    (dict(input_quant=GranQActPerChannel), ValueError, "input_quant needs input_bit_width"),
    (dict(overrides={"0": {"act_bit_width": 8}}), ValueError, "'0' sets 'act_bit_width', which none of its layers has: 0"),
    (dict(weight_quant=GranQActPerChannel), TypeError, "weight_quant must be a Brevitas weight quantizer.*got GranQActPerChannel"),
    (dict(act_quant="GranQ"), TypeError, "act_quant must be a Brevitas activation quantizer.*got 'GranQ'"),
    (dict(overrides={"2": {"act_quant": GranQWeightPerKernel}}), TypeError, "act_quant must be .*got GranQWeightPerKernel"),
])
def test_bad_settings_are_named(kwargs, error, message):
    model = sequential()
    with pytest.raises(error, match=message):
        quantize(model, **kwargs)
    assert not has_quantizer(model)


def test_bad_models_are_named():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        quantize("resnet")
    with pytest.raises(ValueError, match="single Linear.*wrap it in nn.Sequential"):
        quantize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already quantized"):
        quantize(quantize(sequential()))
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        quantize(nn.Sequential(nn.ReLU()))


def test_weights_alone_need_no_relu():
    with pytest.warns(UserWarning, match="cannot be traced"):
        quantized = quantize(Untraceable(relu=False), 4, None)
    assert isinstance(quantized.fc1, qnn.QuantLinear)


def test_torchvision_networks():
    """Shared ReLUs, concatenation, channel shuffles, auxiliary heads; floats survive, and all bits of the pipeline run."""
    models = pytest.importorskip("torchvision.models", reason="torchvision (zoo extra) is not installed")
    relus = dict(resnet18=17, mobilenet_v2=35, squeezenet1_0=26, shufflenet_v2_x0_5=37)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, count in relus.items():
        model = models.get_model(name, weights=None).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            quantized = quantize(model)
            assert len(quant_relus(quantized)) == count, name
            assert torch.isfinite(to_static(quantized, [x])(x)).all(), name


def test_activations_that_stay_float_are_counted():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Hardswish(), nn.Conv2d(4, 4, 1), nn.Hardswish(), nn.GELU())
    with pytest.warns(UserWarning, match="these activations stay float, .*: 2 Hardswish, 1 GELU; put a brevitas.nn.QuantIdentity"):
        quantize(net.eval(), 4, 4)
    quantize(net, 4, None)  # warnings are errors here


def test_no_arrays_for_tensors():
    for act in (GranQActPerChannel, GranQActPerChannelStatic):
        with pytest.raises(TypeError, match="ndarray"):
            qnn.QuantReLU(act, bit_width=4)(np.zeros((1, 2, 3), np.float32))
