"""GranQActPerChannel in every place where Brevitas takes an activation quantizer."""

import copy
import math

import brevitas.nn as qnn
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracles
from granq_plugin import GranQActPerChannel
from granq_plugin.core.quant_tensor import PerChannelQuantTensor

BIT_WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 16]

ACTIVATIONS = {
    "relu": (qnn.QuantReLU, {}, torch.relu),
    "relu6": (qnn.QuantReLU, dict(max_val=6.0), F.relu6),
    "identity": (qnn.QuantIdentity, {}, lambda x: x),
    "identity_own_limits": (qnn.QuantIdentity, dict(min_val=-0.5, max_val=1.5), lambda x: x.clamp(-0.5, 1.5)),
    "hardtanh": (qnn.QuantHardTanh, {}, F.hardtanh),
    "hardtanh_own_limits": (qnn.QuantHardTanh, dict(min_val=-2.0, max_val=0.5), lambda x: x.clamp(-2.0, 0.5)),
    "sigmoid": (qnn.QuantSigmoid, {}, torch.sigmoid),
    "tanh": (qnn.QuantTanh, {}, torch.tanh),
    "hardswish": (qnn.QuantHardSwish, {}, F.hardswish),
}

# quantized layer, its float operation, input shape
LAYERS = {
    "conv1d": (lambda **q: qnn.QuantConv1d(4, 6, 3, **q), F.conv1d, (2, 4, 9)),
    "conv2d": (lambda **q: qnn.QuantConv2d(4, 6, 3, **q), F.conv2d, (2, 4, 7, 6)),
    "conv2d_same_channels": (lambda **q: qnn.QuantConv2d(4, 4, 1, **q), F.conv2d, (2, 4, 7, 6)),
    "conv3d": (lambda **q: qnn.QuantConv3d(4, 6, 2, **q), F.conv3d, (2, 4, 3, 4, 5)),
    "conv_transpose1d": (lambda **q: qnn.QuantConvTranspose1d(4, 6, 3, **q), F.conv_transpose1d, (2, 4, 9)),
    "conv_transpose2d": (lambda **q: qnn.QuantConvTranspose2d(4, 6, 3, **q), F.conv_transpose2d, (2, 4, 5, 6)),
    "linear": (lambda **q: qnn.QuantLinear(4, 6, True, **q), F.linear, (5, 4)),
    "linear_tokens": (lambda **q: qnn.QuantLinear(4, 6, True, **q), F.linear, (2, 3, 4)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_activation_is_the_formula_of_the_float_activation(name, bit_width):
    layer, options, function = ACTIVATIONS[name]
    act = layer(act_quant=GranQActPerChannel, bit_width=bit_width, **options)
    x = 4 * torch.randn(2, 3, 5, 4)
    oracles.assert_equal(act(x), oracles.granq_tensor(function(x), bit_width))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (1, 3, 1, 1), (2, 3, 2, 3, 2), (0, 3, 4, 4)])
def test_activation_of_any_shape(name, shape):
    layer, options, function = ACTIVATIONS[name]
    x = 4 * torch.randn(shape)
    expected = oracles.granq_tensor(function(x), 3) if x.numel() else x
    oracles.assert_equal(layer(act_quant=GranQActPerChannel, bit_width=3, **options)(x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_gradient_is_that_of_the_float_activation(name):
    layer, options, function = ACTIVATIONS[name]
    x = (4 * torch.randn(2, 3, 5, 4)).requires_grad_()
    incoming = torch.randn(2, 3, 5, 4)
    quantized, = torch.autograd.grad(layer(act_quant=GranQActPerChannel, bit_width=3, **options)(x), x, incoming)
    oracles.assert_equal(quantized, torch.autograd.grad(function(x), x, incoming)[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_input_and_output_quantizers(name, bit_width):
    """input_quant and output_quant take no shape argument and give the formula around the float operation."""
    layer, function, shape = LAYERS[name]
    layer = layer(
        weight_quant=None, input_quant=GranQActPerChannel, input_bit_width=bit_width,
        output_quant=GranQActPerChannel, output_bit_width=bit_width)
    x = torch.randn(shape) + 0.5
    y = function(oracles.granq_tensor(x, bit_width), layer.weight, layer.bias)
    oracles.assert_equal(layer(x), oracles.granq_tensor(y, bit_width))


@pytest.mark.parametrize("name", LAYERS)
def test_input_and_output_gradients_pass_unchanged(name):
    layer, function, shape = LAYERS[name]
    layer = layer(
        weight_quant=None, input_quant=GranQActPerChannel, input_bit_width=2,
        output_quant=GranQActPerChannel, output_bit_width=2)
    x = torch.randn(shape, requires_grad=True)
    expected = function(x, layer.weight, layer.bias)
    incoming = torch.randn(expected.shape)
    oracles.assert_equal(
        torch.autograd.grad(layer(x), x, incoming)[0], torch.autograd.grad(expected, x, incoming)[0])


@pytest.mark.parametrize("return_quant_tensor", [False, True])
def test_eltwise_add(return_quant_tensor):
    add = qnn.QuantEltwiseAdd(
        input_quant=GranQActPerChannel, output_quant=GranQActPerChannel, input_bit_width=3, output_bit_width=4,
        return_quant_tensor=return_quant_tensor)
    a, b = torch.randn(2, 3, 4, 4), 10 * torch.randn(2, 3, 4, 4)
    y = add(a, b)
    assert isinstance(y, PerChannelQuantTensor) == return_quant_tensor
    expected = oracles.granq_tensor(oracles.granq_tensor(a, 3) + oracles.granq_tensor(b, 3), 4)
    oracles.assert_equal(y.value if return_quant_tensor else y, expected)


def test_default_is_8_bits():
    x = torch.randn(2, 3, 4, 4)
    oracles.assert_equal(qnn.QuantIdentity(GranQActPerChannel)(x), oracles.granq_tensor(x, 8))


@given(oracles.activations(), oracles.BIT_WIDTHS)
def test_channel_axis_option(drawn, bit_width):
    x, axis = torch.from_numpy(drawn[0]), drawn[1]
    act = qnn.QuantIdentity(GranQActPerChannel, bit_width=bit_width, channel_axis=axis)
    oracles.assert_equal(act(x), oracles.granq_tensor(x, bit_width, axis))


@given(st.sampled_from(["min_val", "max_val"]), st.floats(-1, 1, width=32), oracles.SEEDS)
def test_one_sided_limit(limit, at, seed):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    clamped = x.clamp(min=at) if limit == "min_val" else x.clamp(max=at)
    act = qnn.QuantIdentity(GranQActPerChannel, bit_width=4, **{limit: at})
    oracles.assert_equal(act(x), oracles.granq_tensor(clamped, 4))


def test_metadata():
    act = qnn.QuantReLU(GranQActPerChannel, bit_width=3, return_quant_tensor=True)
    x = torch.randn(2, 3, 4, 4)
    y = act(x)
    _, scale, zero_point = oracles.granq(torch.relu(x).numpy(), 3)
    assert type(y) is PerChannelQuantTensor and y.signed is False and y.training is True and y.bit_width == 3
    oracles.assert_equal(y.scale, scale)
    oracles.assert_equal(y.zero_point, zero_point)
    assert act.act_quant.bit_width() == 3 and act.act_quant.is_signed is False
    for ask in (act.act_quant.scale, act.act_quant.zero_point):
        with pytest.raises(RuntimeError, match="input-dependant"):
            ask()


def test_same_in_training_and_evaluation():
    act, x = qnn.QuantReLU(GranQActPerChannel, bit_width=3), torch.randn(2, 3, 4, 4)
    training = act(x)
    oracles.assert_equal(act.eval()(x), training)


def test_check_finite_option():
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 3] = math.nan
    y = qnn.QuantIdentity(GranQActPerChannel)(x)
    assert y.isnan().sum() == 16 and y[0, 1].isnan().all()
    with pytest.raises(ValueError, match="1 NaN or Inf values of 96"):
        qnn.QuantIdentity(GranQActPerChannel, check_finite=True)(x)


@pytest.mark.parametrize("bit_width, error", [(0, ValueError), (17, ValueError), (2.5, ValueError), (True, TypeError)])
def test_bad_bit_width_is_named_when_the_layer_is_built(bit_width, error):
    with pytest.raises(error, match=f"1 to 16, got {bit_width}"):
        qnn.QuantReLU(GranQActPerChannel, bit_width=bit_width)


def test_let_gives_the_same_options():
    x = torch.randn(2, 4, 5, 3)
    oracles.assert_equal(
        qnn.QuantIdentity(GranQActPerChannel.let(bit_width=2, channel_axis=-1))(x), oracles.granq_tensor(x, 2, 3))


class TestAsAModule:

    def test_has_no_state(self):
        act = qnn.QuantReLU(GranQActPerChannel, bit_width=3)
        assert not act.state_dict() and not list(act.parameters())
        act.load_state_dict({})

    @pytest.mark.parametrize("used_before", [False, True])
    def test_deepcopy(self, used_before):
        act, x = qnn.QuantReLU(GranQActPerChannel, bit_width=3, max_val=1.0), torch.randn(2, 3, 4, 4)
        if used_before:
            act(x)
        twin = copy.deepcopy(act)
        oracles.assert_equal(twin(x), act(x))
        assert twin.act_quant is not act.act_quant

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_module_and_input_of_another_dtype(self, dtype):
        act, x = qnn.QuantReLU(GranQActPerChannel, bit_width=3).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)
        oracles.assert_equal(act(x), oracles.granq_tensor(torch.relu(x), 3))

    def test_autocast(self):
        """Under autocast the convolution gives bfloat16; ranges and scales stay float32."""
        conv, act = nn.Conv2d(3, 4, 3), qnn.QuantReLU(GranQActPerChannel, bit_width=4, return_quant_tensor=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(torch.randn(2, 3, 6, 6))
            out = act(y)
        assert y.dtype == torch.bfloat16 and out.scale.dtype == torch.float32
        oracles.assert_equal(out.value, oracles.granq_tensor(torch.relu(y), 4))

    def test_shared_by_two_layers(self):
        act = qnn.QuantReLU(GranQActPerChannel, bit_width=3)
        for x in (torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2), torch.randn(2, 7)):
            oracles.assert_equal(act(x), oracles.granq_tensor(torch.relu(x), 3))

    @pytest.mark.parametrize("name", ["relu6", "identity"])
    def test_torch_compile_is_bit_exact(self, compiler, name):
        layer, options, _ = ACTIVATIONS[name]
        act = layer(act_quant=GranQActPerChannel, bit_width=4, **options)
        x, incoming = 4 * torch.randn(2, 3, 9, 7), torch.randn(2, 3, 9, 7)
        results = []
        for function in (act, torch.compile(act, fullgraph=True)):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.backward(incoming)
            results.append((y, leaf.grad))
        for eager, compiled in zip(*results):
            oracles.assert_equal(compiled, eager)
