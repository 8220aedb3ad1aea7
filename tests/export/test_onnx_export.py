"""export_qonnx and export_qcdq: whole files that compute what the model computes, or an error and nothing at all."""

import json
import os

import brevitas.nn as qnn
import onnx
import pytest
import torch
from brevitas import config
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import nn

import granq_plugin
from granq_plugin import GranQActPerChannel, GranQWeightPerKernel, quantize
from granq_plugin.export import export_qcdq, export_qonnx, read_metadata, verify
from networks import images32, quantized_as

FORMATS = [export_qonnx, export_qcdq]
KINDS = ("dynamic", "static", "folded")
NETWORKS = ("shortcuts", "mobile", "concat", "mlp")


def assert_agrees(path, model, x, executors=("onnxruntime", "qonnx")):
    """Layer by layer every integer is equal, but for values on a tie, and outputs are close; end to end one tie may flip."""
    for a in verify(path, model, x, executors=executors, batch_size=len(x)).agreements:
        assert a.top1 == a.images and a.close >= a.images - 1, a
        assert a.integers is not None, a.integers_missing
        assert a.integers.unequal == 0 or (a.integers.largest_step == 1 and a.integers.tie_distance < 1e-4), a
        assert a.integers.bound_used <= 1 and not a.integers.unbounded, a
        assert a.integers.output_error < 1e-5


def batch_axis(path):
    return onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_qonnx_and_onnxruntime_agree(tmp_path, name, kind):
    model, x = quantized_as(kind, name), images32(2, 6)
    for export in FORMATS:  # qonnx's executor runs standard operators in onnxruntime: once is enough for these
        executors = ("onnxruntime", "qonnx") if export is export_qonnx or name == "mlp" else ("onnxruntime", )
        assert_agrees(export(model, x[:1], tmp_path / "model.onnx"), model, x, executors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("export", FORMATS)
def test_dynamo_exporter_with_an_open_batch(tmp_path, export, kind):
    model, x = quantized_as(kind, "shortcuts"), images32(2, 6)
    path = export(model, x[:1], tmp_path / "model.onnx", dynamo=True)
    assert batch_axis(path).dim_param
    assert_agrees(path, model, x, ("onnxruntime", "qonnx") if export is export_qonnx else ("onnxruntime", ))
    assert os.listdir(tmp_path) == ["model.onnx"]  # no weights beside it


@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "dynamo"])
def test_fixed_batch(tmp_path, dynamo):
    path = export_qcdq(quantized_as("static", "mlp"), images32(0, 3), tmp_path / "m.onnx", dynamo=dynamo, dynamic_batch=False)
    assert batch_axis(path).dim_value == 3


@pytest.mark.parametrize("bits", [1, 8, 11])
def test_other_bit_widths(tmp_path, bits):
    model, x = quantized_as("static", "chain", bits), images32(2, 6)
    for export in FORMATS:
        assert_agrees(export(model, x, tmp_path / "model.onnx"), model, x)


def test_per_kernel_weights_and_a_quant_tensor_as_output(tmp_path):
    model = nn.Sequential(
        qnn.QuantConv2d(3, 4, 3, weight_quant=GranQWeightPerKernel, weight_bit_width=3),
        qnn.QuantReLU(act_quant=GranQActPerChannel, bit_width=3, return_quant_tensor=True)).eval()
    x = images32(0)
    for dynamo in (False, True):
        path = export_qcdq(model, x, tmp_path / "m.onnx", dynamo=dynamo)
        agreement, = verify(path, model, x, executors=("onnxruntime", )).agreements
        assert agreement.max_rel < 1e-5


def test_the_file_says_what_it_is(tmp_path):
    x = images32(0)
    path = export_qonnx(
        quantized_as("static", "mlp", 3), x, tmp_path / "m.onnx", metadata={"teacher_sha256": "ab" * 32, "accuracy": 89.83})
    stored = read_metadata(path)
    assert stored["plugin_version"] == granq_plugin.__version__ and stored["format"] == "qonnx"
    assert stored["teacher_sha256"] == "ab" * 32 and json.loads(stored["accuracy"]) == 89.83
    assert json.loads(stored["weight_bit_widths"]) == [["1", 3], ["3", 3], ["6", 3]]
    assert json.loads(stored["activation_bit_widths"]) == [["1.input_quant", 8], ["2", 3], ["5", 3]]
    assert stored["activation_ranges"] == "static"


def state_of(model):
    return [(m.training, getattr(m, "export_mode", None), getattr(m, "export_handler", None)) for m in model.modules()]


def test_the_model_is_left_as_it_was(tmp_path):
    model = quantized_as("static", "mlp").train()
    model[0].eval()
    before, parameters = state_of(model), {n: p.clone() for n, p in model.named_parameters()}
    export_qonnx(model, images32(0), tmp_path / "m.onnx")
    assert state_of(model) == before
    assert all(torch.equal(p, parameters[n]) and p.requires_grad for n, p in model.named_parameters())


class Unexportable(nn.Module):
    """Runs, but has an operation that no exporter knows."""

    def __init__(self):
        super().__init__()
        self.layer = quantize(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), act_bit_width=None)

    def forward(self, x):
        return torch.linalg.lu_factor(self.layer(x).T @ self.layer(x))[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "dynamo"])
@pytest.mark.parametrize("export", FORMATS)
def test_a_failed_export_leaves_no_trace(tmp_path, export, dynamo):
    model, x = Unexportable().eval(), images32(0)
    before = state_of(model)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an older file")
    with pytest.raises(ValueError, match=f"cannot be exported to q.* with torch's {'dynamo' if dynamo else 'older'} exporter"):
        export(model, x, path, dynamo=dynamo)
    assert path.read_bytes() == b"an older file" and os.listdir(tmp_path) == ["m.onnx"]
    assert state_of(model) == before and config._ONGOING_EXPORT is None
    assert not any(m.export_mode for m in model.modules() if isinstance(m, QuantProxyFromInjector))
    export(quantized_as("static", "mlp"), x, path)  # Brevitas exports again


class TestBadInput:

    @pytest.mark.parametrize("path, error, message", [
        ("missing/m.onnx", FileNotFoundError, "its folder does not exist"), ("", IsADirectoryError, "is a folder")])
    def test_paths(self, tmp_path, path, error, message, monkeypatch):
        monkeypatch.setattr("granq_plugin.export.onnx_export.to_onnx", lambda *a: pytest.fail("work was done before the check"))
        with pytest.raises(error, match=message):
            export_qonnx(quantized_as("static", "mlp"), images32(0), tmp_path / path)

    def test_a_folder_that_cannot_be_written(self):
        with pytest.raises(OSError, match="cannot write '/proc/m.onnx'"):
            export_qonnx(quantized_as("static", "mlp"), images32(0), "/proc/m.onnx")

    @pytest.mark.parametrize("example, error, message", [
        (torch.zeros(1, 3, 9, 9), ValueError, r"does not run on an example input of shape \(1, 3, 9, 9\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "at least one sample"), (torch.tensor(1.0), ValueError, "at least one sample"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "float32, got torch.uint8"), ("image", TypeError, "got str")])
    def test_examples(self, tmp_path, example, error, message):
        with pytest.raises(error, match=message):
            export_qcdq(quantized_as("static", "mlp"), example, tmp_path / "m.onnx")
        assert not os.listdir(tmp_path)

    def test_models(self, tmp_path):
        x, path = images32(0), tmp_path / "m.onnx"
        for model, error, message in [
                (nn.Conv2d(3, 4, 3), ValueError, "no Brevitas quantizer"), (torch.zeros(3), TypeError, "Module, got Tensor"),
                (quantized_as("static", "mlp").half(), ValueError, "torch.float16 parameters"),
                (quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), act_quant=granq_plugin.GranQActPerChannelStatic).eval(),
                 ValueError, "no ranges yet")]:
            with pytest.raises(error, match=message):
                export_qonnx(model, x, path)
        assert not os.listdir(tmp_path)

    def test_metadata(self, tmp_path):
        with pytest.raises(TypeError, match="metadata 'teacher'"):
            export_qonnx(quantized_as("static", "mlp"), images32(0), tmp_path / "m.onnx", metadata={"teacher": object()})
        with pytest.raises(TypeError, match="keys are strings, got 3"):
            export_qonnx(quantized_as("static", "mlp"), images32(0), tmp_path / "m.onnx", metadata={3: "x"})
        assert not os.listdir(tmp_path)
