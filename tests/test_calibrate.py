"""to_static(): what is collected, what is kept, and what is refused."""

import brevitas.nn as qnn
import pytest
import torch
from torch import nn

from granq_plugin import GranQActPerChannel, GranQActPerChannelStatic, quantize, to_static
from granq_plugin.core.static import StaticGranQ
from networks import FunctionalReLU, SharedReLU, image, quant_relus, sequential


@pytest.mark.parametrize("build", [sequential, SharedReLU, FunctionalReLU])
def test_to_static_freezes_the_float_network_s_average_ranges(build):
    model = build().eval()
    dynamic = quantize(model, 4, 4)
    batches = [image(1), (image(2), torch.zeros(2))]
    static = to_static(dynamic, batches)
    assert static.training == dynamic.training
    quantizers = [m for m in static.modules() if isinstance(m, StaticGranQ)]
    assert len(quantizers) == len(quant_relus(dynamic)) and all(q.scaling_impl.frozen and q.bit_width == 4 for q in quantizers)
    name, relu = next(iter(quant_relus(static).items()))
    maxima = []
    float_model = quantize(model, None, None) if build is sequential else quantize(model, None, 16)
    float_model.get_submodule(name).register_forward_hook(lambda m, i, o: maxima.append(o.detach().amax([0, 2, 3])))
    for x in (image(1), image(2)):
        float_model(x)
    running_max = relu.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.running_max.flatten()
    assert torch.allclose(running_max, torch.stack(maxima).mean(0), rtol=1e-4)
    before = static(image(3))
    assert torch.equal(static(image(3)), before)  # no state moves any more
    # nor does a sample depend on its batch, but for the order in which a processor's kernels add
    torch.testing.assert_close(static(image(3))[:1], static(image(3)[:1]), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(m, StaticGranQ) for m in dynamic.modules())


def test_to_static_keeps_limits_and_shared_proxies():
    model = nn.Sequential(qnn.QuantHardTanh(act_quant=GranQActPerChannel, bit_width=3, min_val=-0.5, max_val=0.5))
    model.append(qnn.QuantIdentity(act_quant=model[0].act_quant))
    static = to_static(model, [torch.randn(8, 3, 4)])
    assert static[0].act_quant is static[1].act_quant
    assert static[0](torch.full((1, 3, 4), 9.0)).max() <= 0.5 + 1e-6


def test_a_static_model_round_trips_through_its_state_dict():
    dynamic = quantize(SharedReLU().eval())
    static = to_static(dynamic, [image(1)])
    other = to_static(dynamic, [image(2)])
    other.load_state_dict(static.state_dict())
    assert torch.equal(other(image()), static(image()))


def test_several_inputs_and_single_modes():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn, self.relu = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()

        def forward(self, x, y):
            return self.relu(self.bn(self.fc(x))) + y

    dynamic = quantize(TwoInputs()).train()
    dynamic.bn.eval()
    batch = dict(x=torch.randn(4, 3), y=torch.randn(4, 3))
    static = to_static(dynamic, [batch], forward=lambda model, b: model(**b))
    assert static.training and not static.bn.training
    with pytest.raises(TypeError, match="for other inputs give forward="):
        to_static(dynamic, [batch])


def test_options_of_the_static_quantizer_are_taken():
    static = to_static(quantize(sequential().eval()), [image(1), image(2)], act_quant=GranQActPerChannelStatic.let(
        range_mode="minmax", learned_scale=True))
    quantizer = static[2].act_quant.fused_activation_quant_proxy.tensor_quant
    assert quantizer.scaling_impl.range_mode == "minmax" and quantizer.learned_scale.shape == (1, 4, 1, 1)


def test_bad_calibration_is_named():
    dynamic = quantize(sequential().eval())
    with pytest.raises(ValueError, match="calibration_batches is empty: 0 batches"):
        to_static(dynamic, [])
    with pytest.raises(ValueError, match="2 batches without a sample"):
        to_static(dynamic, [image(batch=0)] * 2)
    for batches in (image(), None):
        with pytest.raises(TypeError, match="must be an iterable of batches, got a (Tensor|NoneType); give"):
            to_static(dynamic, batches)
    with pytest.raises(TypeError, match="act_quant must be GranQActPerChannelStatic.*got GranQActPerChannel"):
        to_static(dynamic, [image()], act_quant=GranQActPerChannel)
    with pytest.raises(TypeError, match="must be a tensor .* or a tuple that starts with one, got str"):
        to_static(dynamic, ["image"])
    with pytest.raises(ValueError, match=r"^\d+: \d+ of \d+ channel ranges are NaN or Inf: calibration data was not finite"):
        to_static(dynamic, [image() * float("nan")])
    with pytest.raises(ValueError, match="no dynamic GranQ activation quantizer"):
        to_static(sequential(), [image()])


def test_a_failed_calibration_in_place_leaves_the_dynamic_model():
    dynamic = quantize(sequential().eval())
    before = dynamic(image())
    with pytest.raises(RuntimeError):
        to_static(dynamic, [image(), torch.randn(1, 5, 6, 6)], inplace=True)
    assert torch.equal(dynamic(image()), before) and not dynamic.training
    assert to_static(dynamic, [image()], inplace=True) is dynamic


def test_channel_axis_of_tokens():
    """[B, T, C]: ranges per feature, for any number of tokens."""
    dynamic = quantize(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    static = to_static(dynamic, [torch.randn(2, 5, 6)], act_quant=GranQActPerChannelStatic.let(channel_axis=-1))
    assert static[1].act_quant.scale().shape == (1, 1, 6)
    assert static(torch.randn(2, 9, 6)).shape == (2, 9, 6)
    with pytest.raises(ValueError, match="collected for 5 channels, got an input with 9 on axis 1.*channel_axis"):
        to_static(dynamic, [torch.randn(2, 5, 6)])(torch.randn(2, 9, 6))


def test_unreached_quantizers_are_reported():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.relu, self.unused = nn.Linear(3, 3), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.relu(self.main(x))

    with pytest.warns(UserWarning, match="never reached 1 activation quantizers, first: unused"):
        to_static(quantize(Auxiliary()), [torch.randn(4, 3)])


def test_a_static_quantizer_that_does_not_fit_leaves_the_dynamic_model():
    model = quantize(sequential().eval(), 4, 4)
    relus = quant_relus(model)
    relus[list(relus)[-1]].act_quant.fused_activation_quant_proxy.tensor_quant.bit_width = 1
    proxies = [relu.act_quant for relu in relus.values()]
    with pytest.raises(ValueError, match="at least 2, got 1"):
        to_static(model, [image()], act_quant=GranQActPerChannelStatic.let(signed=True), inplace=True)
    assert [relu.act_quant for relu in relus.values()] == proxies and not model.training


def test_without_a_batch_nothing_is_static_though_something_was():
    model = nn.Sequential(qnn.QuantIdentity(GranQActPerChannelStatic), qnn.QuantReLU(GranQActPerChannel)).train()
    model(image())
    model[0].act_quant.fused_activation_quant_proxy.tensor_quant.init_scale()
    with pytest.raises(ValueError, match="calibration_batches is empty"):
        to_static(model, [])
    static = to_static(model, [image()])
    assert static.training and static[1].act_quant.training
