"""report() against counts by hand, and the picture of scales."""

import onnx
import pytest
import torch
from torch import nn

from granq_plugin import quantize, to_static
from granq_plugin.export import export_qcdq, export_qonnx, plot_ranges, report
from granq_plugin.export.ranges_plot import activation_scales
from networks import images32, quantized_as
from zoo.costs import costs


def small(static=True):
    """8 bits at the input; a 3x3 convolution of 4 bits, a depthwise one of 3, float features, a linear layer of 4."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4, 5)).eval()
    model = quantize(net, 4, 4, input_bit_width=8, overrides={"3": {"weight_bit_width": 3}})
    return to_static(model, [images32(0)]) if static else model


BY_HAND = [  # name, operator, macs, weights, their bits, activations, their bits
    ("0", "Conv", 4 * 64 * 27, 4 * 27, 4, 3 * 64, 8), ("3", "Conv", 4 * 4 * 9, 4 * 9, 3, 4 * 16, 4),
    ("7", "Gemm", 20, 20, 4, 4, 32)]


@pytest.mark.parametrize("export, static, dynamo", [
    (export_qonnx, True, False), (export_qonnx, False, False), (export_qcdq, True, False), (export_qcdq, False, False),
    (export_qonnx, True, True), (export_qcdq, False, True)])
def test_counts_by_hand(tmp_path, export, static, dynamo):
    result = report(export(small(static), images32(0, 1), tmp_path / "m.onnx", dynamo=dynamo))
    found = [(c.name, c.op, c.macs, c.weights, c.weight_bits, c.activations, c.activation_bits) for c in result.layers]
    assert found == BY_HAND
    totals = result.totals()
    assert totals["macs"] == 6912 + 144 + 20
    assert totals["bit_operations"] == 6912 * 4 * 8 + 144 * 3 * 4 + 20 * 4 * 32
    assert totals["weight_bytes"] == (108 * 4 + 36 * 3 + 20 * 4) / 8
    assert totals["activation_bytes"] == (192 * 8 + 64 * 4 + 4 * 32) / 8
    assert result.totals(8)["bit_operations"] == totals["macs"] * 64 and result.totals(32)["weight_bytes"] == 164 * 4
    text = str(result)
    assert all(label in text for label in ("at 8 bit", "at float32", "6,912", f"{totals['bit_operations']:,}"))


class Block(nn.Module):
    """Its shortcut is called last, and comes first in qonnx's order."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu1, self.relu2, self.short = nn.ReLU(), nn.ReLU(), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv2(self.relu1(self.conv1(x)))
        return self.relu2(y + self.short(x))


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("export", [export_qonnx, export_qcdq])
def test_branches_keep_their_names_and_bits(tmp_path, export, dynamo):
    net = quantize(Block().eval(), 4, 4, overrides={"short": {"weight_bit_width": 8}})
    result = report(export(net, images32(0, 1), tmp_path / "m.onnx", dynamo=dynamo))
    assert [(c.name, c.weights, c.weight_bits) for c in result.layers] == [
        ("conv1", 108, 4), ("conv2", 144, 4), ("short", 12, 8)]


def test_batches_do_not_count(tmp_path):
    single, batch = (report(export_qonnx(small(), images32(0, b), tmp_path / "m.onnx", dynamic_batch=False)) for b in (1, 4))
    assert single.layers == batch.layers


def test_a_file_of_another_tool(tmp_path):
    path = export_qonnx(small(), images32(0, 1), tmp_path / "m.onnx")
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    found = [(c.weight_bits, c.activation_bits) for c in report(path).layers]
    assert found == [(4, 8), (3, 4), (4, 32)]


def test_bad_files(tmp_path):
    path = export_qonnx(small(), images32(0, 1), tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable ONNX model"):
        report(path)
    relu = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 3]) for n in "xy"]
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([relu], "g", values[:1], values[1:]), opset_imports=opset), path)
    with pytest.raises(ValueError, match="no convolution"):
        report(path)


class TestPicture:

    def test_is_a_png_of_both(self, tmp_path):
        static, folded = quantized_as("static", "shortcuts"), quantized_as("folded", "shortcuts")
        plot_ranges(static, folded, tmp_path / "ranges.png")
        assert (tmp_path / "ranges.png").read_bytes().startswith(b"\x89PNG")
        assert max(len(s) for s in activation_scales(static).values()) == 6
        # folded, only the input's quantizer has another scale than 1
        assert [s.tolist() for n, s in activation_scales(folded).items() if "input_quant" not in n] == [[1.0]] * (
            len(activation_scales(folded)) - 1)

    @pytest.mark.parametrize("dead", [False, True])
    def test_triangles_are_explained_where_there_are_some(self, tmp_path, monkeypatch, dead):
        pytest.importorskip("matplotlib", reason="matplotlib (zoo extra) is not installed")
        from matplotlib.figure import Figure
        titles = []
        monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **_: titles.append(text))
        static = quantized_as("static", "shortcuts")
        drawn = {name: torch.tensor([1.0, 2e-3, 1e-4 if dead else 1.0]) for name in activation_scales(static)}
        monkeypatch.setattr("granq_plugin.export.ranges_plot.activation_scales", lambda model: drawn)
        plot_ranges(static, static, tmp_path / "ranges.png")
        assert ("triangles" in titles[0]) == dead and "dots are channels" in titles[0]

    def test_bad_models(self, tmp_path):
        static = quantized_as("static", "mlp")
        with pytest.raises(ValueError, match="before folding has no static"):
            plot_ranges(quantized_as("dynamic", "mlp"), static, tmp_path / "r.png")
        with pytest.raises(FileNotFoundError, match="its folder does not exist"):
            plot_ranges(static, static, tmp_path / "none" / "r.png")
        assert not list(tmp_path.iterdir())


def test_transposed_convolutions(tmp_path):
    """Each value that is read meets every weight of its input channel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)).eval()
    x = images32(0, 1)[:, :, :8, :8]
    layer = report(export_qonnx(quantize(net, 4, 4), x, tmp_path / "m.onnx")).layers[1]
    assert (layer.op, layer.macs, layer.weights, layer.activations) == ("ConvTranspose", 288 * 27, 8 * 27, 288)
    assert costs(net, x).macs == 8 * 36 * 27 + layer.macs
