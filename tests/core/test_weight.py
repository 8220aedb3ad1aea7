"""The weight quantizers against numpy."""

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brevitas.quant import Int8ActPerTensorFloat
from hypothesis import given
from hypothesis import strategies as st

import oracles
from granq_plugin import GranQActPerChannel, GranQWeightPerChannel, GranQWeightPerChannelSymmetric, GranQWeightPerKernel

# layer of 3 input and 5 output channels, axis of the output channels
LAYERS = {
    "linear": (lambda **q: qnn.QuantLinear(3, 5, True, **q), 0),
    "conv1d": (lambda **q: qnn.QuantConv1d(3, 5, 3, **q), 0),
    "conv2d": (lambda **q: qnn.QuantConv2d(3, 5, (3, 2), **q), 0),
    "conv2d_1x1": (lambda **q: qnn.QuantConv2d(3, 5, 1, **q), 0),
    "conv3d": (lambda **q: qnn.QuantConv3d(3, 5, 2, **q), 0),
    "depthwise": (lambda **q: qnn.QuantConv2d(5, 5, 3, groups=5, **q), 0),
    "conv_transpose1d": (lambda **q: qnn.QuantConvTranspose1d(3, 5, 3, **q), 1),
    "conv_transpose2d": (lambda **q: qnn.QuantConvTranspose2d(3, 5, 3, **q), 1),
}
PER_CHANNEL = {False: GranQWeightPerChannel, True: GranQWeightPerChannelSymmetric}


def layer_with_weights(name: str, seed: int, **quant):
    """The layer, with weights of channels that differ in scale, sign and offset, and some that are exactly zero."""
    layer, axis = LAYERS[name][0](**quant), LAYERS[name][1]
    rng = np.random.default_rng(seed)
    shape = layer.weight.shape
    per_channel = [n if d == axis else 1 for d, n in enumerate(shape)]
    w = rng.standard_normal(shape) * 10.0**rng.uniform(-4, 2, per_channel)
    w += rng.choice([0, 0, 3, -3], per_channel) * np.abs(w).max()
    w *= rng.random(shape) > 0.2
    w *= rng.random(per_channel) > 0.1
    layer.weight.data = torch.from_numpy(w.astype(np.float32))
    return layer, axis


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("symmetric", PER_CHANNEL)
@given(oracles.SEEDS, oracles.BIT_WIDTHS)
def test_per_channel(name, symmetric, seed, bit_width):
    """Values, integers in their range, zero kept exactly, scale of the output axis, identity gradient."""
    bit_width = max(bit_width, 1 + symmetric)
    layer, axis = layer_with_weights(name, seed, weight_quant=PER_CHANNEL[symmetric], weight_bit_width=bit_width)
    w = layer.weight
    q = layer.quant_weight()
    oracles.assert_equal(q.value, oracles.weight_quant(w, bit_width, axis, symmetric))
    assert q.scale.shape == q.zero_point.shape == tuple(5 if d == axis else 1 for d in range(w.dim()))
    assert not q.value[w == 0].any()
    integers = q.value / q.scale + q.zero_point
    assert (integers - integers.round()).abs().max() < 0.02
    low, high = (1 - 2**(bit_width - 1), 2**(bit_width - 1) - 1) if symmetric else (0, 2**bit_width - 1)
    assert integers.round().min() >= low and integers.round().max() <= high
    assert layer.weight_quant.is_narrow_range is symmetric and layer.weight_quant.is_signed is symmetric
    assert q.signed is symmetric and (not symmetric or not q.zero_point.any())
    incoming = torch.from_numpy(np.random.default_rng(seed).standard_normal(w.shape).astype(np.float32))
    gradient, = torch.autograd.grad(q.value, w, incoming)
    torch.testing.assert_close(gradient, incoming, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("symmetric", PER_CHANNEL)
@given(oracles.SEEDS, st.integers(2, 8))
def test_ranges_of_least_error(name, symmetric, seed, bit_width):
    """Of the shares 1, 0.9 ... 0.4 of every channel's min/max range, the one that numpy finds best; clipped weights get no
    gradient."""
    quant = PER_CHANNEL[symmetric].let(range_mode="mse")
    layer, axis = layer_with_weights(name, seed, weight_quant=quant, weight_bit_width=bit_width)
    w = layer.weight.detach().numpy()
    q = layer.quant_weight()
    others = tuple(d for d in range(w.ndim) if d != axis)
    errors = []
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        lo, hi = (np.float32(share) * end for end in oracles.ranges(w, axis))
        tried = oracles.affine_quantize(w, lo, hi, bit_width, symmetric, symmetric)
        errors.append(((tried.astype(np.float64) - w)**2).sum(others))
    actual = ((q.value.detach().numpy().astype(np.float64) - w)**2).sum(others)
    np.testing.assert_allclose(actual, np.min(errors, 0), rtol=1e-4, atol=1e-30)
    assert not q.value[layer.weight == 0].any()
    steps = q.value / q.scale + q.zero_point
    low, high = (1 - 2**(bit_width - 1), 2**(bit_width - 1) - 1) if symmetric else (0, 2**bit_width - 1)
    assert (steps - steps.round()).abs().max() < 0.02 and steps.round().min() >= low and steps.round().max() <= high
    gradient, = torch.autograd.grad(q.value.sum(), layer.weight)
    far = (layer.weight / q.scale + q.zero_point - (low + high) / 2).abs() - (high - low) / 2
    assert (gradient[far < 0.49] > 0.999).all() and not gradient[far > 0.51].any()


def test_unknown_range_mode_is_named():
    with pytest.raises(ValueError, match="range_mode of weights must be one of minmax, mse, got 'ema'"):
        qnn.QuantConv2d(3, 5, 3, weight_quant=GranQWeightPerChannel, weight_range_mode="ema")


@pytest.mark.parametrize("quant", [*PER_CHANNEL.values(), GranQWeightPerKernel])
@pytest.mark.parametrize("name, function", [
    ("linear", F.linear), ("conv2d", F.conv2d), ("conv_transpose2d", F.conv_transpose2d)])
def test_layer_is_the_float_operation_on_quantized_weights(quant, name, function):
    layer, _ = layer_with_weights(name, 1, weight_quant=quant, weight_bit_width=3)
    x = torch.randn((4, 3) if name == "linear" else (2, 3, 6, 6))
    oracles.assert_equal(layer(x), function(x, layer.quant_weight().value, layer.bias))


@pytest.mark.parametrize("quant", [*PER_CHANNEL.values(), GranQWeightPerKernel])
def test_weight_gradient_is_that_of_the_float_layer(quant):
    """Straight-through: the weight gets the gradient that the quantized weight gets."""
    layer, _ = layer_with_weights("conv2d", 2, weight_quant=quant, weight_bit_width=3)
    x = torch.randn(2, 3, 6, 6)
    quantized = layer.quant_weight().value.detach().requires_grad_()
    y = F.conv2d(x, quantized, layer.bias)
    incoming = torch.randn(y.shape)
    expected, = torch.autograd.grad(y, quantized, incoming)
    actual, = torch.autograd.grad(layer(x), layer.weight, incoming)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_symmetric_needs_two_bits():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        qnn.QuantConv2d(3, 5, 3, weight_quant=GranQWeightPerChannelSymmetric, weight_bit_width=1)


@pytest.mark.parametrize("quant", [*PER_CHANNEL.values(), GranQWeightPerKernel])
@pytest.mark.parametrize("bit_width, error", [(0, ValueError), (17, ValueError), (2.5, ValueError), (True, TypeError)])
def test_bad_bit_width_is_named(quant, bit_width, error):
    with pytest.raises(error, match=f"1 to 16, got {bit_width}"):
        qnn.QuantConv2d(3, 5, 3, weight_quant=quant, weight_bit_width=bit_width)


@pytest.mark.parametrize("quant", [*PER_CHANNEL.values(), GranQWeightPerKernel])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(quant, dtype):
    layer = qnn.QuantConv2d(3, 5, 3, weight_quant=quant, weight_bit_width=4).to(dtype)
    q = layer.quant_weight().value
    reference = qnn.QuantConv2d(3, 5, 3, weight_quant=quant, weight_bit_width=4)
    reference.weight.data = layer.weight.data.float()
    assert q.dtype == dtype
    torch.testing.assert_close(q.float(), reference.quant_weight().value, rtol=1e-2, atol=1e-3)


class TestPerKernel:

    @pytest.mark.parametrize("name", LAYERS)
    @given(oracles.SEEDS, oracles.BIT_WIDTHS)
    def test_is_the_papers_formula(self, name, seed, bit_width):
        """One range per (output, input) kernel, one per row of a linear weight."""
        layer, _ = layer_with_weights(name, seed, weight_quant=GranQWeightPerKernel, weight_bit_width=bit_width)
        q = layer.quant_weight()
        expected_parts = oracles.granq(layer.weight.detach().numpy(), bit_width)
        for actual, expected in zip((q.value, q.scale, q.zero_point), expected_parts):
            oracles.assert_equal(actual, expected)
        incoming = torch.randn(layer.weight.shape)
        oracles.assert_equal(torch.autograd.grad(q.value, layer.weight, incoming)[0], incoming)

    @given(oracles.SEEDS, st.integers(1, 8))
    def test_1x1_kernels_stay_unquantized(self, seed, bit_width):
        """Why its results are for comparison only."""
        layer = qnn.QuantConv2d(16, 32, 1, weight_quant=GranQWeightPerKernel, weight_bit_width=bit_width)
        w = torch.from_numpy(np.random.default_rng(seed).uniform(0.05, 1, (32, 16, 1, 1)).astype(np.float32))
        layer.weight.data = w
        q = layer.quant_weight().value
        assert ((q - w).abs() <= 2**-23 * w.abs() + 0.5e-8).all()  # float32 rounding, and half a step of 1e-8
        assert (q - w).norm() <= 1e-7 * w.norm()
        assert q.unique().numel() > 2**8

    def test_with_a_stock_per_tensor_input_quantizer(self):
        conv = qnn.QuantConv2d(
            3, 5, 3, weight_quant=GranQWeightPerKernel, weight_bit_width=3, input_quant=Int8ActPerTensorFloat)
        x = torch.randn(2, 3, 6, 6)
        conv(x)
        conv.eval()
        oracles.assert_equal(conv(x), F.conv2d(conv.input_quant(x).value, conv.quant_weight().value, conv.bias))
        oracles.assert_equal(
            conv.quant_weight().value, torch.from_numpy(oracles.granq(conv.weight.detach().numpy(), 3)[0]))


@pytest.mark.parametrize("symmetric", PER_CHANNEL)
def test_per_channel_with_a_stock_per_tensor_input_quantizer(symmetric):
    """Symmetric weights give Brevitas's own quant tensor, as stock ones do; it has none for asymmetric weights."""
    conv = qnn.QuantConv2d(
        3, 5, 3, weight_quant=PER_CHANNEL[symmetric], weight_bit_width=3, input_quant=Int8ActPerTensorFloat,
        return_quant_tensor=symmetric)
    x = torch.randn(2, 3, 6, 6)
    conv(x)
    conv.eval()
    y = conv(x)
    expected = F.conv2d(conv.input_quant(x).value, conv.quant_weight().value, conv.bias)
    oracles.assert_equal(y.value if symmetric else y, expected)
    assert not symmetric or y.scale.shape == (1, 5, 1, 1)


@pytest.mark.parametrize("quant", [GranQWeightPerChannel, GranQWeightPerChannelSymmetric, GranQWeightPerKernel])
def test_a_layer_without_weights_says_what_it_takes(quant):
    with pytest.raises(TypeError, match="QuantReLU takes an activation quantizer, such as GranQActPerChannel; got one of weights"):
        qnn.QuantReLU(act_quant=quant, bit_width=4)


@pytest.mark.parametrize("quant, layer, kwargs, message", [
    (GranQWeightPerChannel, qnn.QuantLinear, dict(weight_narrow_range=True), "narrow_range=True needs signed=True"),
    (GranQWeightPerKernel, qnn.QuantLinear, dict(weight_signed=True), "PerKernelGranQ has asymmetric ranges"),
    (GranQActPerChannel, qnn.QuantIdentity, dict(signed=True), "DynamicGranQ has asymmetric ranges"),
    (GranQActPerChannel, qnn.QuantIdentity, dict(narrow_range=True), "narrow_range=True needs signed=True")])
def test_what_asymmetric_quantizers_do_not_know(quant, layer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(quant, **kwargs) if layer is qnn.QuantIdentity else layer(4, 3, bias=False, weight_quant=quant, **kwargs)
