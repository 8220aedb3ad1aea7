"""prepare(): after calibration and folding, every layer and every addition reads integers."""

import brevitas.nn as qnn
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from granq_plugin import to_static
from granq_plugin.deploy import fold, prepare
from networks import FOLDABLE, images64, quant_relus, randomized


class Recorder(torch.fx.Interpreter):
    """Node -> value."""

    def __init__(self, model):
        super().__init__(model)
        self.values = {}

    def run_node(self, n):
        self.values[n] = super().run_node(n)
        return self.values[n]


def prepared(model, **options):
    return prepare(model, images64(0, 1), **{"weight_bit_width": None, **options})


@pytest.mark.parametrize("name", FOLDABLE)
def test_every_layer_and_addition_reads_integers(name):
    static = to_static(prepared(randomized(FOLDABLE[name](), 0)), [images64(1, 16)])
    folded = fold(static, images64(0))
    recorder = Recorder(folded)
    with torch.no_grad():
        y = recorder.run(images64(2))
        expected = static(images64(2))
    for a, b in zip(y if isinstance(y, tuple) else (y, ), expected if isinstance(expected, tuple) else (expected, )):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max() and b.std() > 0
    values, layers, adds = recorder.values, 0, 0
    for node in folded.graph.nodes:
        module = folded.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            x = values[node.all_input_nodes[0]]
            unit = folded.get_submodule("input_quant_0").act_quant.scale() if layers == 0 else 1
            assert torch.equal(x / unit, (x / unit).round()) and x.std() > 0, node
            layers += 1
        elif "add" in node.name:
            quantizers = [n.target for n in node.all_input_nodes]
            assert len(set(quantizers)) == 1 and quantizers[0].startswith("residual_quant")
            assert all(torch.equal(values[n], values[n].round()) for n in node.all_input_nodes)
            adds += 1
    assert layers == sum(isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in folded.modules())
    assert adds == dict(residual=5, mobile=2).get(name, 0)


def test_bit_widths_names_and_the_input():
    model = randomized(FOLDABLE["residual"](), 0)
    before = model(images64(3))
    result = prepared(model, act_bit_width=3, residual_bit_width=5, pool_bit_width=7, input_bit_width=6)
    assert torch.equal(model(images64(3)), before)
    assert result.get_submodule("3.conv1").weight.shape == (4, 4, 3, 3)
    static = to_static(result, [images64(1, 16)])
    bits = {n.rstrip("_0123456789"): m.act_quant.bit_width().item() for n, m in static.named_modules()
            if isinstance(m, qnn.QuantIdentity)}
    assert bits == dict(input_quant=6, residual_quant=5, pool_quant=7)
    mobile = prepared(randomized(FOLDABLE["mobile"](), 0), residual_bit_width=5)
    assert mobile.get_submodule("layer_input_quant_0").act_quant.bit_width() == 5  # behind the linear bottleneck of stride 2
    assert {m.act_quant.bit_width().item() for m in quant_relus(static).values()} == {3}
    scale = static.input_quant_0.act_quant.scale()
    assert scale.shape == () and scale.log2() == scale.log2().round() and static.input_quant_0.act_quant.is_signed


def test_the_shared_range_is_that_of_both_branches():
    static = to_static(prepared(randomized(FOLDABLE["residual"](), 0)), [images64(1, 16), images64(2, 16)])
    ranges = {}
    for node in static.graph.nodes:
        if str(node.target).startswith("residual_quant_0"):
            ranges[node] = []

    class Float(Recorder):
        def run_node(self, n):
            if n in ranges:
                x = self.values[n.all_input_nodes[0]]
                ranges[n].append(x.abs().amax((0, 2, 3)))
                self.values[n] = x
                return x
            return super().run_node(n)

    from brevitas.graph.calibrate import calibration_mode
    with torch.no_grad(), calibration_mode(static):
        for seed in (1, 2):
            Float(static).run(images64(seed, 16))
    expected = torch.stack([m for maxima in ranges.values() for m in maxima]).amax(0)
    assert len(ranges) == 2
    torch.testing.assert_close(static.residual_quant_0.act_quant.scale().flatten().double() * 127, expected.clamp_min(1e-8))


@pytest.mark.parametrize("pool", [
    nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(6), lambda x: F.adaptive_avg_pool2d(x, 1),
    pytest.param(lambda x: F.avg_pool2d(x, x.size(3)), marks=pytest.mark.skipif(
        torch.__version__ < (2, 9), reason="torch 2.8 cannot trace a kernel size that the network computes")),
    lambda x: x.mean([2, 3], keepdim=True), lambda x: x.mean((-1, -2)), lambda x: torch.mean(x, dim=(2, 3))])
def test_global_pools_become_adaptive_ones_with_a_quantizer_behind(pool):

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.pool, self.fc = nn.Conv2d(3, 5, 3), nn.ReLU(), pool, nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(torch.flatten(self.pool(self.relu(self.conv(x))), 1))

    model = randomized(Net(), 0)
    result = prepared(model)
    pools = [n for n in result.graph.nodes if n.op == "call_module" and isinstance(
        result.get_submodule(n.target), nn.AdaptiveAvgPool2d)]
    assert len(pools) == 1 and next(iter(pools[0].users)).target == "pool_quant_0"
    fine = to_static(prepared(model, act_bit_width=16, pool_bit_width=16, input_bit_width=16), [images64(1, 16)])
    torch.testing.assert_close(fine(images64(1)), model(images64(1)), rtol=0, atol=2e-3)


def test_training_collects_the_ranges_of_the_new_quantizers():
    model = prepared(randomized(FOLDABLE["residual"](), 0)).train()
    with torch.no_grad():
        model(images64(1, 16))
    assert model.residual_quant_0.act_quant.scale().shape == (1, 4, 1, 1)
    assert torch.isfinite(model.eval()(images64(2))).all()
    fresh = prepared(randomized(FOLDABLE["residual"](), 0))
    with pytest.raises(RuntimeError, match="no ranges yet"):
        fresh(images64(2))


def test_bad_arguments():
    model = randomized(FOLDABLE["chain"](), 0)
    with pytest.raises(ValueError, match="residual_bit_width must be at least 2 .*got 1"):
        prepared(model, residual_bit_width=1)
    with pytest.raises(ValueError, match="whole number from 1 to 16, got 0"):
        prepared(model, pool_bit_width=0)
    with pytest.raises(TypeError, match="input_bit_width, not input_quant"):
        prepared(model, input_quant=None)
    with pytest.raises(ValueError, match=r"cannot run on example_input float\d+ \[1, 3, 2, 2\]"):
        prepare(model, torch.zeros(1, 3, 2, 2).double())
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        prepare("model", images64(0))
    with pytest.raises(ValueError, match="already quantized"):
        prepared(prepared(model))
