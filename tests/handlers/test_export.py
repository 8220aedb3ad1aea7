"""What our quantizers become in files: Brevitas's own export functions on single quantizers and layers, bit for bit."""

import brevitas.nn as qnn
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from brevitas.export import export_onnx_qcdq, export_qonnx, export_torch_qcdq
from brevitas.export.onnx.qonnx.manager import QONNXManager
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
from brevitas.graph.calibrate import calibration_mode
from hypothesis import given, settings
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_shapes import InferShapes
from torch import nn

import granq_plugin
import oracles
from granq_plugin import (
    GranQActPerChannel,
    GranQActPerChannelStatic,
    GranQWeightPerChannel,
    GranQWeightPerChannelSymmetric,
    GranQWeightPerKernel,
)
from granq_plugin.export import register_handlers

WEIGHTS = [GranQWeightPerChannel, GranQWeightPerChannelSymmetric, GranQWeightPerChannelSymmetric.let(range_mode="mse"),
           GranQWeightPerKernel]


def in_onnxruntime(path, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def in_qonnx(path, x):
    model = ModelWrapper(str(path)).transform(InferShapes())
    output, = execute_onnx(model, {model.graph.input[0].name: x.numpy()}).values()
    return output


def exported(model, x, folder, file_format, dynamo=False):
    """What the exported model makes of x."""
    path = folder / "model.onnx"
    export, run = dict(qonnx=(export_qonnx, in_qonnx), qcdq=(export_onnx_qcdq, in_onnxruntime))[file_format]
    options = dict(dynamo=True, optimize=True, external_data=False, verbose=False) if dynamo else dict(dynamo=False)
    export(model, args=x, export_path=str(path), opset_version=18, **options)
    return run(path, x)


def static(x, **options):
    """A static quantizer with the ranges of x."""
    act = qnn.QuantIdentity(GranQActPerChannelStatic, range_mode="minmax", **options)
    with calibration_mode(act):
        act(x)
    return act.eval()


def ties(bit_width):
    """Values of which every second one lies on a tie of the grid with step 1, with a range that makes that step."""
    levels = 2**bit_width - 1
    lo = -(levels // 2)
    x = torch.arange(2 * lo, 2 * (lo + levels) + 1) / 2
    return torch.stack([x, x])[None]


class TestActivations:

    @pytest.mark.parametrize("file_format", ["qonnx", "qcdq"])
    @given(oracles.activations(), oracles.BIT_WIDTHS)
    @settings(max_examples=15)
    def test_dynamic_is_the_formula_bit_for_bit(self, tmp_path_factory, file_format, drawn, bit_width):
        x, axis = drawn
        x = torch.from_numpy(x)
        act = qnn.QuantIdentity(GranQActPerChannel, bit_width=bit_width, channel_axis=axis).eval()
        found = exported(act, x, tmp_path_factory.mktemp("onnx"), file_format)
        oracles.assert_equal(torch.from_numpy(found), granq_plugin.functional.granq(x, bit_width, axis).value)

    @pytest.mark.parametrize("file_format", ["qonnx", "qcdq"])
    @pytest.mark.parametrize("bit_width, dynamo", [
        (1, False), (3, False), (8, False), (9, False), (16, False), (1, True), (3, True), (9, True)])
    def test_static_with_zero_points_and_ties(self, tmp_path, file_format, dynamo, bit_width):
        x = ties(min(bit_width, 8))
        act = static(x, bit_width=bit_width)
        y = act(x)
        oracles.assert_equal(torch.from_numpy(exported(act, x, tmp_path, file_format, dynamo)), y.detach())
        assert act.act_quant.zero_point().any() or bit_width == 1

    @pytest.mark.parametrize("file_format", ["qonnx", "qcdq"])
    @pytest.mark.parametrize("options", [
        dict(signed=True), dict(signed=True, narrow_range=True), dict(signed=True, narrow_range=True, bit_width=12),
        dict(min_val=-0.5, max_val=0.5), dict(channel_axis=-1)], ids=str)
    def test_static_options(self, tmp_path, file_format, options):
        x = torch.randn(2, 3, 4)
        act = static(x, **dict(bit_width=4) | options)
        oracles.assert_equal(torch.from_numpy(exported(act, 3 * x, tmp_path, file_format)), act(3 * x).detach())

    def test_a_dynamic_clamp_is_kept(self, tmp_path):
        act = qnn.QuantHardTanh(GranQActPerChannel, bit_width=4).eval()
        x = torch.randn(2, 3, 4) * 3
        oracles.assert_equal(torch.from_numpy(exported(act, x, tmp_path, "qcdq")), act(x).detach())

    def test_zero_zero_points_become_a_scalar(self, tmp_path):
        x = torch.randn(2, 3, 4, 4)
        act = static(x.relu(), bit_width=4)
        exported(act, x, tmp_path, "qonnx")
        model = ModelWrapper(str(tmp_path / "model.onnx"))
        node, = model.get_nodes_by_op_type("Quant")
        assert model.get_initializer(node.input[1]).shape == (1, 3, 1, 1)
        assert model.get_initializer(node.input[2]).shape == () and model.get_initializer(node.input[2]) == 0

    @pytest.mark.parametrize("bit_width, expected", [(4, 1), (8, 0)])
    def test_qcdq_is_quantize_clip_dequantize(self, tmp_path, bit_width, expected):
        x = torch.rand(2, 3, 4, 4)
        exported(static(x, bit_width=bit_width), x, tmp_path, "qcdq")
        operators = [n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type != "Constant"]
        assert operators == ["QuantizeLinear"] + ["Clip"] * expected + ["DequantizeLinear"]

    @pytest.mark.parametrize("file_format", ["qonnx", "qcdq"])
    def test_one_quantizer_for_tensors_of_several_ranks(self, tmp_path, file_format):

        class Twice(nn.Module):
            def __init__(self, act):
                super().__init__()
                self.act = act

            def forward(self, x):
                return self.act(x).flatten(2) - self.act(x.flatten(2) / 2)

        x = torch.randn(2, 3, 4, 4)
        model = Twice(static(x, bit_width=4)).eval()
        oracles.assert_equal(torch.from_numpy(exported(model, x, tmp_path, file_format)), model(x).detach())


class WeightOnly(nn.Module):
    """Returns a layer's quantized weight (plus the input, which an exporter needs)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        weight = self.layer.quant_weight()
        return getattr(weight, "value", weight) + x


LAYERS = {
    "conv": lambda **q: qnn.QuantConv2d(4, 6, 3, **q), "grouped": lambda **q: qnn.QuantConv2d(4, 6, 3, groups=2, **q),
    "one channel": lambda **q: qnn.QuantConv2d(3, 1, 3, **q), "linear": lambda **q: qnn.QuantLinear(4, 6, bias=True, **q),
    "transposed": lambda **q: qnn.QuantConvTranspose2d(4, 6, 3, **q)}


class TestWeights:

    @pytest.mark.parametrize("file_format", ["qonnx", "qcdq"])
    @pytest.mark.parametrize("bit_width", [1, 4, 8, 11])
    @pytest.mark.parametrize("quant", WEIGHTS)
    @pytest.mark.parametrize("kind", list(LAYERS))
    def test_values_are_torchs(self, tmp_path, kind, quant, bit_width, file_format):
        if bit_width == 1 and issubclass(quant, GranQWeightPerChannelSymmetric):
            pytest.skip("symmetric weights have at least 2 bits")
        model = WeightOnly(LAYERS[kind](weight_quant=quant, weight_bit_width=bit_width)).eval()
        x = torch.zeros(1)
        oracles.assert_equal(torch.from_numpy(exported(model, x, tmp_path, file_format)), model(x).detach())

    @pytest.mark.parametrize("file_format", ["qonnx", "qcdq"])
    def test_dynamo(self, tmp_path, file_format):

        class Together(nn.Module):
            def __init__(self):
                super().__init__()
                self.weights = nn.ModuleList(WeightOnly(LAYERS["conv"](weight_quant=q, weight_bit_width=4)) for q in WEIGHTS)

            def forward(self, x):
                return torch.stack([weight(x) for weight in self.weights])

        model, x = Together().eval(), torch.zeros(1)
        found = exported(model, x, tmp_path, file_format, dynamo=True)
        oracles.assert_equal(torch.from_numpy(found), model(x).detach())

    @pytest.mark.parametrize("bit_width, dtype", [(4, np.uint8), (11, np.int32)])
    def test_qcdq_stores_integers(self, tmp_path, bit_width, dtype):
        model = WeightOnly(LAYERS["conv"](weight_quant=GranQWeightPerChannel, weight_bit_width=bit_width)).eval()
        exported(model, torch.zeros(1), tmp_path, "qcdq")
        stored = [onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "model.onnx").graph.initializer]
        weight, = [a for a in stored if a.ndim == 4]
        assert weight.dtype == dtype
        assert (np.ptp(weight.astype(int), (1, 2, 3)) == 2**bit_width - 1).all()

    @pytest.mark.parametrize("file_format", ["qonnx", "qcdq"])
    def test_layers_that_share_a_quantizer(self, tmp_path, file_format):
        first = qnn.QuantLinear(4, 4, bias=False, weight_quant=GranQWeightPerChannel, weight_bit_width=3)
        second = qnn.QuantLinear(4, 4, bias=False, weight_quant=first.weight_quant)
        model, x = nn.Sequential(first, second).eval(), torch.eye(4)
        assert not torch.equal(first.quant_weight().scale, second.quant_weight().scale)
        found = exported(model, x, tmp_path, file_format)
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-6, atol=1e-7)


class TestTorchQCDQ:

    @pytest.mark.parametrize("quant", WEIGHTS)
    @pytest.mark.parametrize("act", [GranQActPerChannel, GranQActPerChannelStatic])
    @pytest.mark.parametrize("bit_width", [2, 8, 12])
    def test_bit_equal(self, quant, act, bit_width):
        model = nn.Sequential(
            qnn.QuantIdentity(act, bit_width=bit_width), qnn.QuantConv2d(2, 4, 1, weight_quant=quant, weight_bit_width=bit_width))
        x = ties(8)[..., None]
        model(x)
        model.eval()
        expected = model(x).detach()
        oracles.assert_equal(export_torch_qcdq(model, x)(x).detach(), expected)


def test_registering_again_changes_nothing():
    before = [list(m.handlers) for m in (QONNXManager, StdQCDQONNXManager)]
    register_handlers()
    assert [m.handlers for m in (QONNXManager, StdQCDQONNXManager)] == before
    assert all(len(set(handlers)) == len(handlers) for handlers in before)
