"""export_finn(): what FINN reads, or the reason why it is not."""

import json
import os
import shutil

import pytest
from qonnx.core.modelwrapper import ModelWrapper
from torch import nn

from granq_plugin import GranQWeightPerChannel, quantize, to_static
from granq_plugin.deploy import check_finn, clear_ties, export_finn, fold, prepare
from granq_plugin.export import read_metadata, report, verify
from networks import FOLDABLE, images32, quantized_as, randomized


@pytest.mark.parametrize("name", ["shortcuts", "mobile", "without_norm", "mlp"])
def test_file_keeps_the_rules_and_computes_the_same(tmp_path, name):
    model, x = quantized_as("folded", name), images32(2, 4)
    path = export_finn(model, x, tmp_path / "m.onnx", metadata={"accuracy": 88.5})
    graph = ModelWrapper(str(path))
    assert check_finn(str(path)).passed
    assert graph.get_tensor_shape(graph.graph.input[0].name) == [1, 3, 8, 8]
    for a in verify(path, model, x).agreements:
        assert a.top1 == 4 and a.close >= 3 and a.integers.output_error < 1e-5
        assert a.integers.unequal == 0 or (a.integers.largest_step == 1 and a.integers.tie_distance < 1e-4)
    named = {layer.name: layer for layer in report(path).layers}
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "quant_weight")}
    assert named.keys() == modules.keys()  # clean-up sorts the layers differently; their names follow
    assert all(named[n].weights == m.weight.numel() and named[n].weight_bits == 4 for n, m in modules.items())
    stored = read_metadata(path)
    assert stored["format"] == "finn" and json.loads(stored["accuracy"]) == 88.5


def test_datatypes_are_annotated_and_layers_read_integers(tmp_path):
    path = export_finn(quantized_as("folded", "without_norm"), images32(0, 1), tmp_path / "m.onnx")
    graph = ModelWrapper(str(path))
    types = [graph.get_tensor_datatype(n.output[0]).name for n in graph.graph.node
             if n.op_type == "Quant" and graph.get_initializer(n.input[0]) is None]
    assert types[1:] == ["UINT4", "UINT4", "INT8"]  # two ReLUs, the pooled features


@pytest.mark.skipif(not shutil.which("g++"), reason="hls4ml's simulation is compiled with g++")
@pytest.mark.filterwarnings("ignore")
def test_hls4ml_simulation_agrees(tmp_path, monkeypatch, capfd):
    """Without its prints; of a compiler that fails, with what it says."""
    pytest.importorskip("hls4ml", reason="needs the extra hls")
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    x = images32(2, 20)
    model = clear_ties(fold(to_static(prepare(randomized(net, 1).float(), x[:1]), [images32(1)]), x[:1]), x[:1])[0]
    path = export_finn(model, x, tmp_path / "m.onnx")
    result = verify(path, model, x, executors=("hls4ml", ))
    agreement, = result.agreements
    assert agreement.close == agreement.top1 == 20 and agreement.integers is None and result.agrees
    assert agreement.hls4ml_integers == (20 * 6 * 16, 20 * 6 * 16) and "leave hls4ml, end to end: 1920 of 1920" in str(result)
    assert capfd.readouterr().out == ""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho the compiler is ill\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="hls4ml does not take this model: .* it printed: .*the compiler is ill"):
        verify(path, model, x, executors=("hls4ml", ))


class Opposite(nn.Module):

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return -self.model(x)


@pytest.mark.parametrize("k", [1, 3])
def test_top_k(tmp_path, k):
    model, x = quantized_as("folded", "mlp"), images32(3, 5)
    path = export_finn(model, x, tmp_path / "m.onnx", top_k=k)
    assert ModelWrapper(str(path)).graph.node[-1].op_type == "TopK"
    for a in verify(path, model, x).agreements:
        assert a.exact == a.top1 == 5
    assert verify(path, Opposite(model), x, executors=("onnxruntime", )).agreements[0].top1 == 0


class TestRefusals:

    def refused(self, model, message, folder, **options):
        with pytest.raises(ValueError, match=message):
            export_finn(model, images32(0, 1), folder / "m.onnx", **options)
        assert not list(folder.iterdir())

    def test_dynamic(self, tmp_path):
        self.refused(quantized_as("dynamic", "mlp"), "'2.act_quant' is dynamic.*to_static", tmp_path)

    def test_not_folded(self, tmp_path):
        self.refused(quantized_as("static", "mlp"), "'1.input_quant' has one scale per channel.*fold", tmp_path)

    def test_asymmetric_weights(self, tmp_path):
        model = prepare(randomized(FOLDABLE["mlp"](), 0).float(), images32(0, 1), weight_quant=GranQWeightPerChannel)
        folded = fold(to_static(model, [images32(1)]), images32(0, 1))
        self.refused(folded, "breaks rules of FINN: symmetric-weights", tmp_path)

    def test_float_input(self, tmp_path):
        static = to_static(quantize(randomized(FOLDABLE["mlp"](), 0).float(), 4, 4), [images32(1)])
        self.refused(fold(static, images32(0, 1)), "not by a quantizer", tmp_path)

    @pytest.mark.parametrize("k", [0, 4, 1.0, True])
    def test_top_k(self, tmp_path, k):
        self.refused(quantized_as("folded", "mlp"), "top_k must be a whole number from 1 to 3", tmp_path, top_k=k)
