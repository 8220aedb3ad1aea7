"""Brevitas's own tools work on nets quantized with GranQ."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import brevitas.nn as qnn
import pytest
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.export.inference.manager import InferenceManager
from brevitas.graph import quantize_impl
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode, norm_correction_mode
from brevitas.graph.quantize import (
    COMPUTE_LAYER_MAP,
    LAYERWISE_COMPUTE_LAYER_MAP,
    QUANT_ACT_MAP,
    QUANT_IDENTITY_MAP,
    layerwise_quantize,
    preprocess_for_quantize,
    quantize,
)
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import nn

import oracles
from granq_plugin import (
    GranQActPerChannel,
    GranQActPerChannelStatic,
    GranQWeightPerChannel,
    GranQWeightPerChannelSymmetric,
    GranQWeightPerKernel,
    register_handlers,
)
from granq_plugin.core.proxy import GranQActProxy
from granq_plugin.core.ranges import CollectedRange
from granq_plugin.core.weight import MinMaxWeightQuant

ACTS = {"dynamic": GranQActPerChannel, "static": GranQActPerChannelStatic}
WEIGHTS = {
    "per_channel": GranQWeightPerChannel, "symmetric": GranQWeightPerChannelSymmetric,
    "mse": GranQWeightPerChannel.let(range_mode="mse"), "per_kernel": GranQWeightPerKernel}

every_net = pytest.mark.parametrize("act, weight", [(a, w) for a in ACTS for w in WEIGHTS])


def calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    model.eval()
    with torch.no_grad(), calibration_mode(model):
        model(x)
    return model.eval()


def net_of(act: str, weight: str, **options) -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(4, 3, 8, 8)
    return calibrated(oracles.QuantNet(ACTS[act], WEIGHTS[weight], **options), x), x


def act_proxies(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, GranQActProxy)]


def float_output(net: oracles.QuantNet, x: torch.Tensor) -> torch.Tensor:
    """The output of the same weights without any quantization."""
    x = torch.relu(net.bn1(net.conv1._conv_forward(x, net.conv1.weight, net.conv1.bias)))
    x = torch.relu(net.conv2._conv_forward(x, net.conv2.weight, net.conv2.bias))
    return nn.functional.linear(x.mean((2, 3)), net.fc.weight, net.fc.bias)


class TestCalibrationAndCorrection:

    @every_net
    def test_calibration_mode_runs_the_float_network(self, act, weight):
        net, x = oracles.QuantNet(ACTS[act], WEIGHTS[weight]).eval(), torch.randn(4, 3, 8, 8)
        with torch.no_grad(), calibration_mode(net):
            y = net(x)
        torch.testing.assert_close(y, float_output(net, x), rtol=1e-5, atol=1e-6)
        assert (net(x) - y).abs().max() > 1e-3  # and quantization is back
        assert all(m.frozen for m in net.modules() if isinstance(m, CollectedRange))

    @every_net
    def test_bias_correction(self, act, weight):
        """Each layer's mean output per channel becomes that of its float self."""
        net, x = net_of(act, weight)
        before = copy.deepcopy(net)
        with torch.no_grad(), bias_correction_mode(net):
            net(x)
        assert not torch.equal(net.conv1.bias, before.conv1.bias)
        with torch.no_grad():
            wanted = net.conv1._conv_forward(x, net.conv1.weight, before.conv1.bias).mean((0, 2, 3))
            torch.testing.assert_close(net.conv1(x).mean((0, 2, 3)), wanted, rtol=1e-4, atol=1e-5)
            assert (before.conv1(x).mean((0, 2, 3)) - wanted).abs().max() > 1e-4

    @every_net
    def test_norm_correction(self, act, weight):
        """BatchNorm's statistics follow the quantized network's activations."""
        net, x = net_of(act, weight)
        before = copy.deepcopy(net)
        with torch.no_grad(), norm_correction_mode(net):
            net(x)
        net.eval()
        assert not torch.equal(net.bn1.running_var, before.bn1.running_var)
        assert torch.isfinite(net(x)).all()


class TestLayerwise:

    @pytest.mark.parametrize("act", ACTS)
    def test_layer_map(self, act):
        """Each layer as numpy quantizes its input and weight.

        Brevitas loads the float layer's state under config.IGNORE_MISSING_KEYS, which a quantizer with state of its own
        has to heed, as Brevitas's do.
        """
        settings = dict(
            input_quant=ACTS[act], input_bit_width=4, weight_quant=GranQWeightPerChannel, weight_bit_width=4,
            bias_quant=None, return_quant_tensor=False)
        layer_map = LAYERWISE_COMPUTE_LAYER_MAP | {
            nn.Conv2d: (qnn.QuantConv2d, settings), nn.Linear: (qnn.QuantLinear, settings)}
        x = torch.randn(4, 3, 8, 8)
        float_net = oracles.FloatResNet().eval()
        net = calibrated(layerwise_quantize(copy.deepcopy(float_net), compute_layer_map=layer_map), x)
        assert len(act_proxies(net)) == 3 and isinstance(net.fc, qnn.QuantLinear)
        reference = copy.deepcopy(float_net)  # the same quantization by hooks that call numpy
        for name in ("conv1", "conv2", "fc"):
            layer = reference.get_submodule(name)
            layer.weight.data = oracles.weight_quant(layer.weight, 4)
            if act == "dynamic":
                layer.register_forward_pre_hook(lambda m, args: (oracles.granq_tensor(args[0], 4), ))
            else:
                layer.register_forward_pre_hook(quantize_as_calibrated(float_net, name, x))
        oracles.assert_equal(net(x), reference(x))


def quantize_as_calibrated(float_net: nn.Module, name: str, x: torch.Tensor):
    """A hook that quantizes a layer's input with the ranges that it has in the float network on x."""
    seen = []
    layer = float_net.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().numpy()))
    float_net(x)
    handle.remove()
    ends = oracles.ranges(seen[0], 1)
    return lambda m, args: (torch.from_numpy(oracles.affine_quantize(args[0].detach().numpy(), *ends, 4)), )


class TestGraphMode:
    """``preprocess_for_quantize`` + ``quantize`` with a residual addition.

    Brevitas takes the operands of an addition as aligned when their quantizers' ``scaling_impl`` and
    ``int_scaling_impl`` are the same objects. It injects those of one into the others and looks again, until they are.
    """

    @pytest.fixture(autouse=True)
    def _few_iterations(self, monkeypatch):
        """Fail after 20 rounds where alignment never comes; Brevitas tries 9999 times, which takes hours."""
        monkeypatch.setattr(quantize_impl, "MAX_RESIDUAL_ITERS", 20)

    @staticmethod
    def quantized(act: str, bit_width: int, x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
        # a convolution of per-channel scaled input has no quant tensor to return
        weight = dict(
            weight_quant=GranQWeightPerChannel, weight_bit_width=bit_width, bias_quant=None, return_quant_tensor=False)
        # operands of an addition share their ranges: their union clips neither, their average would
        quant_options = dict(range_mode="minmax") if act == "static" else {}
        quant = dict(act_quant=ACTS[act], bit_width=bit_width, return_quant_tensor=True, **quant_options)
        float_net = preprocess_for_quantize(oracles.FloatResNet().eval())
        net = quantize(
            copy.deepcopy(float_net),
            quant_identity_map=QUANT_IDENTITY_MAP | dict.fromkeys(("signed", "unsigned"), (qnn.QuantIdentity, quant)),
            compute_layer_map=COMPUTE_LAYER_MAP | {
                nn.Conv2d: (qnn.QuantConv2d, weight), nn.Linear: (qnn.QuantLinear, weight)},
            quant_act_map=QUANT_ACT_MAP | {nn.ReLU: (qnn.QuantReLU, quant)})
        return float_net, calibrated(net, x)

    @pytest.mark.parametrize("act", ACTS)
    def test_every_activation_is_quantized_with_granq(self, act):
        _, net = self.quantized(act, 4, torch.randn(4, 3, 8, 8))
        enabled = [m for m in net.modules() if isinstance(m, QuantProxyFromInjector) and m.is_quant_enabled]
        kinds = [type(m).__name__ for m in enabled]
        assert len(act_proxies(net)) >= 4 and all("GranQ" in k or k.startswith("Weight") for k in kinds), kinds
        assert sum(isinstance(m, MinMaxWeightQuant) for m in net.modules()) == 3

    @pytest.mark.parametrize("act", ACTS)
    def test_comes_near_the_float_network_with_more_bits(self, act):
        x = torch.randn(4, 3, 8, 8)
        errors = []
        for bit_width in (2, 4, 8, 16):
            torch.manual_seed(0)
            float_net, net = self.quantized(act, bit_width, x)
            with torch.no_grad():
                y, expected = net(x), float_net(x)
            errors.append(((y - expected).norm() / expected.norm()).item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 < 1e-2 < errors[0]

    def test_residual_operands_and_output_are_on_their_grids(self):
        """What enters and leaves the layers has at most 2^3 levels per channel (one more for a tie)."""
        x = torch.randn(4, 3, 8, 8)
        _, net = self.quantized("dynamic", 3, x)
        counts = []

        def count_levels(module, args, out):
            planes = out.value.flatten(0, 1) if out.value.dim() > 2 else out.value
            counts.extend(plane.unique().numel() for plane in planes)

        for m in act_proxies(net):
            m.register_forward_hook(count_levels)
        net(x)
        assert len(counts) >= 4 * 4 and max(counts) <= 9 and max(counts) > 2


class TestInferenceMode:

    @every_net
    @pytest.mark.parametrize("cache_quant_weight", [False, True])
    @pytest.mark.parametrize("return_quant_tensor", [False, True])
    def test_same_bits_inside_and_after(self, act, weight, cache_quant_weight, return_quant_tensor):
        net, x = net_of(act, weight, max_val=0.8, return_quant_tensor=return_quant_tensor)
        with torch.no_grad():
            expected, other = net(x), net(2 * x[:2])
            with quant_inference_mode(net, cache_quant_weight=cache_quant_weight):
                net(x)  # the first pass fills Brevitas's caches, the handlers work from the second on
                assert any(m.export_mode for m in act_proxies(net))
                oracles.assert_equal(net(x), expected)
                oracles.assert_equal(net(2 * x[:2]), other)
            assert not any(m.export_mode for m in act_proxies(net))
            oracles.assert_equal(net(x), expected)

    @pytest.mark.parametrize("act", ACTS)
    @pytest.mark.parametrize("layer, options", [
        (qnn.QuantHardTanh, {}), (qnn.QuantHardTanh, dict(min_val=-2.0, max_val=0.5)), (qnn.QuantSigmoid, {}),
        (qnn.QuantReLU, dict(max_val=6.0)), (qnn.QuantIdentity, dict(bit_width=1)),
        (qnn.QuantIdentity, dict(bit_width=16))])
    def test_limits_hold(self, act, layer, options):
        net, x = nn.Sequential(layer(ACTS[act], **options)), 10 * torch.randn(2, 3, 4, 4)
        calibrated(net, x / 2)
        expected = net(x)
        with torch.no_grad(), quant_inference_mode(net):
            net(x)
            oracles.assert_equal(net(x), expected)

    @pytest.mark.parametrize("options", [
        dict(signed=True), dict(signed=True, narrow_range=True), dict(learned_scale=True)])
    def test_static_options(self, options):
        net = nn.Sequential(qnn.QuantIdentity(GranQActPerChannelStatic, bit_width=3, **options))
        x = torch.randn(2, 3, 4, 4)
        calibrated(net, x)
        expected = net(2 * x)
        with torch.no_grad(), quant_inference_mode(net):
            net(x)
            oracles.assert_equal(net(2 * x), expected)

    @every_net
    def test_half_precision(self, act, weight):
        """The weight scales are float32: the handler has to bring the quantized weight back to the weight's dtype."""
        net, x = net_of(act, weight)
        net, x = net.bfloat16(), x.bfloat16()
        with torch.no_grad():
            expected = net(x)
            with quant_inference_mode(net):
                net(x)
                oracles.assert_equal(net(x), expected)

    def test_handlers_are_registered_once(self):
        before = list(InferenceManager.handlers)
        register_handlers()
        assert InferenceManager.handlers == before
        assert len(set(before)) == len(before) and sum("GranQ" in h.__name__ for h in before) == 3


class TestCompile:

    @pytest.mark.parametrize("act, weight", [
        ("dynamic", "per_channel"), ("static", "symmetric"), ("dynamic", "per_kernel")])
    def test_compile_quant(self, exact_compiler, act, weight):
        net, x = net_of(act, weight)
        with torch.no_grad():
            expected = net(x)
            compiled = [m for m in net.modules() if isinstance(m, QuantProxyFromInjector) and m.is_quant_enabled]
            for proxy in compiled:
                proxy.compile_quant()
            oracles.assert_equal(net(x), expected)
        assert len(compiled) == 5


_JIT_SCRIPT = """
import sys, torch, brevitas.config
from test_brevitas_facilities import jit_outputs
assert brevitas.config.JIT_ENABLED
torch.set_num_threads(1)
torch.save(jit_outputs(), sys.argv[1])
"""


def jit_outputs() -> dict[str, torch.Tensor]:
    """Output and input gradient of a net for every pair of quantizers; the same wherever it runs."""
    outputs = {}
    for act in ACTS:
        for weight in WEIGHTS:
            torch.manual_seed(1)
            net, x = net_of(act, weight)
            x.requires_grad_()
            y = net(x)
            outputs[act, weight] = torch.cat([y.flatten(), torch.autograd.grad(y.sum(), x)[0].flatten()]).detach()
    return outputs


def test_brevitas_jit_gives_the_same_bits(tmp_path):
    env = os.environ | dict(BREVITAS_JIT="1", PYTHONPATH=str(Path(__file__).parent))
    run = subprocess.run(
        [sys.executable, "-c", _JIT_SCRIPT, str(tmp_path / "out.pt")], env=env, cwd=tmp_path, capture_output=True,
        text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    scripted = torch.load(tmp_path / "out.pt")
    for pair, output in jit_outputs().items():
        oracles.assert_equal(scripted[pair], output)
