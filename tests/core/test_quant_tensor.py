"""PerChannelQuantTensor keeps its metadata where that stays true, and is a plain Tensor everywhere else."""

import brevitas.nn as qnn
import pytest
import torch
import torch.nn.functional as F
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Int32Bias
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

import oracles
from granq_plugin import GranQActPerChannel, GranQActPerChannelStatic
from granq_plugin.core.quant_tensor import PerChannelQuantTensor

QUANTIZERS = {"dynamic": GranQActPerChannel, "static": GranQActPerChannelStatic}


@pytest.fixture(params=QUANTIZERS)
def act_quant(request):
    return QUANTIZERS[request.param]


@pytest.fixture
def q(act_quant) -> PerChannelQuantTensor:
    """A [2, 6, 8, 8] quant tensor whose channels have widely differing scales, with values of both signs."""
    return quant_tensor(act_quant)


def quant_tensor(act_quant, x=None, **options) -> PerChannelQuantTensor:
    if x is None:
        x = torch.randn(2, 6, 8, 8) * torch.logspace(-2, 2, 6).view(1, 6, 1, 1) + 0.1
    q = qnn.QuantIdentity(act_quant, bit_width=4, return_quant_tensor=True, **options)(x)
    assert type(q) is PerChannelQuantTensor
    return q


def assert_on_own_grid(out, source: PerChannelQuantTensor) -> None:
    """Same metadata, and every value is one of the integers of its channel's grid.

    Only a channel that is all zero now may have another zero point: every grid of its scale has a zero.
    """
    assert type(out) is PerChannelQuantTensor
    assert out.signed is source.signed and out.training is source.training
    oracles.assert_equal(out.scale, source.scale)
    oracles.assert_equal(out.bit_width, source.bit_width)
    moved = (out.zero_point != source.zero_point).expand_as(out.value)
    assert not out.value[moved].any()
    integers = out.value / out.scale + out.zero_point
    assert (integers - integers.round()).abs().max() < 1e-3
    assert integers.round().min() >= 0 and integers.round().max() <= 15


class TestInLayers:

    @pytest.mark.parametrize("out_channels", [6, 5], ids=["O == C", "O != C"])
    @pytest.mark.parametrize("return_quant_tensor", [False, True])
    def test_conv_is_the_float_conv_of_the_values(self, act_quant, out_channels, return_quant_tensor):
        """With O == C and a static scale, stock Brevitas silently scales output channels by input channels' scales."""
        conv = qnn.QuantConv2d(6, out_channels, 3, weight_quant=Int8WeightPerTensorFloat)
        x = torch.randn(2, 6, 8, 8) * torch.logspace(-2, 2, 6).view(1, 6, 1, 1)
        q = quant_tensor(act_quant, x)
        y = conv(q if return_quant_tensor else q.value)
        assert type(y) is Tensor
        oracles.assert_equal(y, F.conv2d(q.value, conv.quant_weight().value, conv.bias))

    @pytest.mark.parametrize("out_channels", [6, 5], ids=["O == C", "O != C"])
    def test_conv_with_input_quant(self, act_quant, out_channels):
        conv = qnn.QuantConv2d(
            6, out_channels, 3, input_quant=act_quant, input_bit_width=4, weight_quant=Int8WeightPerTensorFloat)
        x = torch.randn(2, 6, 8, 8)
        y = conv(x)
        oracles.assert_equal(y, F.conv2d(conv.input_quant(x).value, conv.quant_weight().value, conv.bias))

    @pytest.mark.parametrize("layer, function", [
        (lambda: qnn.QuantConvTranspose2d(6, 6, 3), F.conv_transpose2d), (lambda: qnn.QuantConv2d(6, 6, 3, groups=6),
                                                                          lambda x, w, b: F.conv2d(x, w, b, groups=6))])
    def test_other_convs(self, q, layer, function):
        layer = layer()
        y = layer(q)
        assert type(y) is Tensor
        oracles.assert_equal(y, function(q.value, layer.quant_weight().value, layer.bias))

    @pytest.mark.parametrize("out_features", [6, 5])
    def test_linear(self, act_quant, out_features):
        q = quant_tensor(act_quant, torch.randn(6, 6))
        layer = qnn.QuantLinear(6, out_features, True)
        y = layer(q)
        assert type(y) is Tensor
        oracles.assert_equal(y, F.linear(q.value, layer.quant_weight().value, layer.bias))

    @pytest.mark.parametrize("layer", [
        nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.0)])
    def test_float_layers_take_it(self, q, layer):
        layer.eval()
        y = layer(q)
        assert type(y) is Tensor
        oracles.assert_equal(y, layer(q.value))

    @pytest.mark.parametrize("out_channels", [6, 5])
    def test_int32_bias_fails_loudly(self, q, out_channels):
        """There is no one input scale to quantize a bias with."""
        conv = qnn.QuantConv2d(6, out_channels, 3, bias_quant=Int32Bias)
        with pytest.raises(RuntimeError, match="[Ss]cale"):
            conv(q)

    def test_quantizer_after_quantizer(self, act_quant, q):
        """A quantizer takes a quant tensor's values."""
        again = quant_tensor(GranQActPerChannel, q)
        oracles.assert_equal(again.value, oracles.granq_tensor(q.value, 4))


class TestDecay:

    @pytest.mark.parametrize("name, function", [
        ("add", lambda q, o: q + o), ("radd", lambda q, o: o + q), ("torch_add", torch.add),
        ("sub", lambda q, o: q - o), ("rsub", lambda q, o: o - q),
        ("mul", lambda q, o: q * o), ("rmul", lambda q, o: o * q),
        ("div", lambda q, o: q / (o + 10)), ("rdiv", lambda q, o: o / (q + 1000)),
        ("cat", lambda q, o: torch.cat([q, o], 1)), ("stack", lambda q, o: torch.stack([o, q])),
        ("add_method", lambda q, o: q.add(o)), ("where", lambda q, o: torch.where(torch.arange(8) > 3, q, o)),
    ])
    @pytest.mark.parametrize("other", ["tensor", "quant_tensor"])
    def test_with_another(self, q, name, function, other):
        o = torch.randn(2, 6, 8, 8) if other == "tensor" else quant_tensor(GranQActPerChannel, torch.randn(2, 6, 8, 8))
        y = function(q, o)
        assert type(y) is Tensor
        oracles.assert_equal(y, function(q.value, o if other == "tensor" else o.value))

    @pytest.mark.parametrize("function", [
        lambda q: q + 1, lambda q: 1 + q, lambda q: q - 1, lambda q: 1 - q, lambda q: 2 * q, lambda q: q * 2,
        lambda q: q / 2, lambda q: -q, lambda q: abs(q), torch.neg, torch.abs, torch.sum,
        lambda q: q.flatten(1), lambda q: torch.flatten(q, 1), lambda q: q.reshape(2, -1), lambda q: q.view(2, -1),
        lambda q: torch.reshape(q, (2, -1)), lambda q: q.transpose(1, 2), lambda q: q.permute(0, 2, 3, 1),
        lambda q: torch.permute(q, (3, 2, 1, 0)),
        lambda q: F.avg_pool2d(q, 2), lambda q: F.adaptive_avg_pool2d(q, 1), lambda q: F.pad(q, (1, 1)),
        lambda q: F.interpolate(q, scale_factor=2, mode="bilinear"), lambda q: F.interpolate(q, None, 2, "bilinear"),
        nn.Upsample(scale_factor=2, mode="bicubic"), F.leaky_relu, torch.sigmoid, lambda q: torch.mean(q, (2, 3)),
    ])
    def test_alone(self, q, function):
        y = function(q)
        assert type(y) is Tensor
        oracles.assert_equal(y, function(q.value))

    def test_in_place_addition_leaves_the_operand(self, q):
        value = q.value.clone()
        y = q
        y += torch.ones(2, 6, 8, 8)
        oracles.assert_equal(y, value + 1)
        oracles.assert_equal(q.value, value)

    def test_addition_to_a_stock_quant_tensor(self, q):
        """In both orders, and to a plain Tensor: a single scale cannot describe the sum."""
        stock = qnn.QuantIdentity(Int8ActPerTensorFloat, return_quant_tensor=True).eval()(torch.randn(2, 6, 8, 8))
        assert isinstance(stock, IntQuantTensor)
        for y in (q + stock, stock + q):
            assert type(y) is Tensor
            oracles.assert_equal(y, q.value + stock.value)
        for order in ([q, stock], [stock, q]):
            y = torch.cat(order, 1)
            assert type(y) is Tensor
            oracles.assert_equal(y, torch.cat([o.value for o in order], 1))

    def test_gradient_passes(self, act_quant):
        x = torch.randn(2, 6, 4, 4, requires_grad=True)
        quant_tensor(act_quant, x, min_val=-9.0, max_val=9.0).flatten(1).sum().backward()
        oracles.assert_equal(x.grad, torch.ones_like(x))


class TestKept:

    @pytest.mark.parametrize("function", [
        lambda q: F.max_pool2d(q, 2), lambda q: torch.max_pool2d(q, 2), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1),
        lambda q: F.adaptive_max_pool2d(q, 3), nn.AdaptiveMaxPool2d(1), torch.relu, F.relu, nn.ReLU(),
        lambda q: F.interpolate(q, scale_factor=2), lambda q: F.interpolate(q, scale_factor=2, mode="nearest"),
        lambda q: F.interpolate(q, size=(5, 3), mode="nearest-exact"), nn.Upsample(scale_factor=3)])
    def test_grid_preserving(self, q, function):
        y = function(q)
        assert_on_own_grid(y, q)
        oracles.assert_equal(y.value, function(q.value))

    @pytest.mark.parametrize("pool, shape", [
        (lambda q: F.max_pool1d(q, 2), (2, 6, 8)), (nn.MaxPool1d(2), (2, 6, 8)), (nn.AdaptiveMaxPool1d(3), (2, 6, 8)),
        (lambda q: F.max_pool3d(q, 2), (2, 6, 4, 4, 4)), (nn.MaxPool3d(3), (2, 6, 4, 4, 4))])
    def test_other_pools(self, act_quant, pool, shape):
        q = quant_tensor(act_quant, torch.randn(shape))
        y = pool(q)
        assert_on_own_grid(y, q)
        oracles.assert_equal(y.value, pool(q.value))

    def test_pool_with_indices_gives_plain_tensors(self, q):
        value, indices = F.max_pool2d(q, 2, return_indices=True)
        assert type(value) is Tensor and type(indices) is Tensor
        oracles.assert_equal(value, F.max_pool2d(q.value, 2))

    @pytest.mark.parametrize("shift", [-5, 5], ids=["below zero", "above zero"])
    @pytest.mark.parametrize("name", QUANTIZERS)
    def test_relu_of_a_channel_on_one_side_of_zero(self, name, shift):
        """A dynamic grid does not contain 0 there: whatever ReLU returns must still have integers, or be plain."""
        q = quant_tensor(QUANTIZERS[name], torch.rand(1, 2, 4, 4) + shift)
        y = torch.relu(q)
        if isinstance(y, PerChannelQuantTensor):
            assert_on_own_grid(y, q)
        oracles.assert_equal(y.value if isinstance(y, PerChannelQuantTensor) else y, torch.relu(q.value))

    def test_upsampling_where_the_scale_no_longer_fits(self):
        """With the channels last, pooling over them would leave a scale that broadcasts to nothing."""
        q = quant_tensor(GranQActPerChannel, torch.randn(2, 8, 8, 6), channel_axis=-1)
        assert type(F.max_pool2d(q, 2)) is Tensor

    def test_integers(self, q):
        integers = q.int()
        assert integers.dtype == torch.uint8 and integers.max() <= 15
        back = (integers - q.zero_point) * q.scale
        torch.testing.assert_close(back, q.value, rtol=1e-5, atol=1e-5)

    def test_tensor_methods_are_those_of_the_plain_value(self, q):
        for function in (lambda t: t.mean((2, 3)), lambda t: t.sum(), lambda t: t[0], lambda t: t[:, ::2], lambda t: t**2,
                         lambda t: t.chunk(2, 1)[1]):
            oracles.assert_equal(function(q), function(q.value))
        assert q.dtype == torch.float32 and q.ndim == 4
        with pytest.raises(AttributeError):
            getattr(q, "no_such_thing")  # noqa: B009

    def test_detach_contiguous_to_and_set(self, q):
        assert not q.detach().value.requires_grad
        assert q.to(torch.float64).value.dtype == torch.float64
        assert type(q.contiguous()) is PerChannelQuantTensor
        assert q.set(value=q.value * 0).value.abs().max() == 0
        assert q.shape == (2, 6, 8, 8) and q.dim() == 4 and q.size(1) == 6 and q.device.type == "cpu"
