"""verify(): files that compute the same pass, files that do not are seen, damaged ones are refused."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from onnx import numpy_helper
from torch import nn

import oracles
from granq_plugin import quantize
from granq_plugin.export import export_qcdq, export_qonnx, verify
from granq_plugin.export.executors import lower_quant, open_executor
from granq_plugin.export.files import read_onnx, set_metadata
from granq_plugin.export.integers import distances
from granq_plugin.export.verification import _are_largest, _relative
from networks import images32, quantized_as


@pytest.fixture
def exported(tmp_path):
    """``(path, model, images)`` of a static network in QONNX."""
    model, x = quantized_as("static", "without_norm"), images32(2, 6)
    return export_qonnx(model, x[:1], tmp_path / "m.onnx"), model, x


def changed(path, change, sign=True):
    """Change the stored model, and make its digest fit again."""
    proto = onnx.load(path)
    change(proto)
    if sign:
        set_metadata(proto, {})
    onnx.save(proto, path)


def largest_initializer(proto):
    return max((i for i in proto.graph.initializer if len(i.dims) > 1), key=lambda i: np.prod(i.dims))


def scale_by(factor):

    def change(proto):
        weight = largest_initializer(proto)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))

    return change


def scale_all_by(factor):

    def change(proto):
        """The scales of the weights, which are all that multiplies them."""
        constant = {i.name for i in proto.graph.initializer} | {n.output[0] for n in proto.graph.node if n.op_type == "Constant"}
        integers = {n.output[0] for n in proto.graph.node if n.op_type == "Clip" and n.input[0] in constant} | constant
        nodes = [n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in integers]
        assert nodes
        for i in proto.graph.initializer:
            if i.name in {n.input[1] for n in nodes}:
                i.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(i) * np.float32(factor), i.name))
        for n in proto.graph.node:
            if n.op_type == "Constant" and n.output[0] in {m.input[1] for m in nodes}:
                n.attribute[0].t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(n.attribute[0].t) * np.float32(factor)))

    return change


def test_counts(exported):
    path, model, x = exported
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    seen = []
    result = verify(path, model, x, labels=labels, batch_size=4, progress=seen.append)
    assert [a.executor for a in result.agreements] == ["onnxruntime", "qonnx"] and seen == [4, 2, 4, 2]
    for a in result.agreements:
        assert (a.images, a.close, a.top1, a.correct, a.torch_correct) == (6, 6, 6, 5, 5)
        assert a.max_rel < 1e-5 and a.integers.values == 6 * (3 * 64 + 6 * 64 + 6 * 4) and a.integers.quantizers == 3
        assert a.integers.unequal == 0
    assert "6 within 1e-05" in str(result) and "3 quantizers" in str(result)
    of_few = replace(result, agreements=tuple(replace(a, exact=0, max_abs=1e-7) for a in result.agreements))
    assert "0 bit-equal" in str(of_few) and "its own order: the integers below decide" in str(of_few)


def test_a_wrong_weight_is_seen(exported):
    path, model, x = exported
    changed(path, scale_by(1.5))
    result = verify(path, model, x)
    for a in result.agreements:
        assert a.close < a.images and a.max_rel > 1e-3 and a.exact == 0 and a.integers.bound_used > 1
    assert not result.agrees and "THE FILE COMPUTES SOMETHING ELSE" in str(result)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_weights_off_by_a_thousandth_of_themselves_are_seen(tmp_path, kind):
    """Far below a step: only the bound on float32's rounding tells these few integers from ties."""
    model, x = quantized_as(kind, "shortcuts"), images32(2, 40)
    path = export_qcdq(model, x[:1], tmp_path / "m.onnx")
    assert verify(path, model, x, executors=("onnxruntime", )).agrees
    changed(path, scale_all_by(1 + 1e-3))
    result = verify(path, model, x, executors=("onnxruntime", ))
    check = result.agreements[0].integers
    assert not result.agrees and 0 < check.unequal < check.values / 20 and check.bound_used > 10


@given(oracles.SEEDS)
@settings(max_examples=8)
def test_another_order_of_summation_is_no_disagreement(seed):
    """A narrow dynamic range far from 0, cut in steps of 1e-4 of its values: integers differ, and the bound explains them."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(64, 4, 3, bias=True), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].bias.fill_(10.0)
        net[0].weight.mul_(0.02)
    model, x = quantize(net, 8, 8), torch.randn(4, 64, 12, 12)
    forward, permutation = model[0].forward, torch.randperm(64)
    with tempfile.TemporaryDirectory() as folder:
        path = export_qonnx(model, x, Path(folder, "m.onnx"))
        weight = model[0].quant_weight().value[:, permutation]
        model[0].forward = lambda y: torch.nn.functional.conv2d(y[:, permutation], weight, model[0].bias)
        result = verify(path, model, x, executors=("onnxruntime", ))
        model[0].forward = forward
    assert result.agrees and result.agreements[0].integers.bound_used <= 1
    assert "float32 sums in another order explain each" in str(result) or result.agreements[0].integers.unequal == 0


def test_without_a_bound_only_ties_pass(tmp_path):
    model, x = quantize(torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 4), torch.nn.ReLU(),
        torch.nn.Sigmoid(), torch.nn.Linear(4, 3)), 8, 8).eval(), images32(0, 50)
    path = export_qcdq(model, x, tmp_path / "m.onnx")
    changed(path, scale_all_by(2))
    result = verify(path, model, x, executors=("onnxruntime", ))
    assert not result.agrees and "rounding errors of Sigmoid are not known" in str(result)


def test_a_wrong_quantizer_is_seen_in_the_integers_alone(exported):
    path, model, x = exported

    def double_the_last_scale(proto):
        node = [n for n in proto.graph.node if n.op_type == "Quant"][-3]  # the last activation's, before two weights'
        scale = next(i for i in proto.graph.initializer if i.name == node.input[1])
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))

    changed(path, double_the_last_scale)
    for a in verify(path, model, x).agreements:
        assert a.integers.unequal > 0 and a.integers.tie_distance > 0.1


def test_a_tie_is_told_from_an_error(exported):
    """An activation that is off by a millionth of a step flips only what lies that close to a tie."""
    path, model, x = exported
    with torch.no_grad():  # every second value of the input quantizer on a tie
        scale = model[0].input_quant.scale()
        x = scale * (torch.randint(0, 200, x.shape) + 0.5 - model[0].input_quant.zero_point())

    def shift(proto):
        name = proto.graph.input[0].name
        for node in proto.graph.node:
            for i, source in enumerate(node.input):
                if source == name:
                    node.input[i] = "shifted"
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(1 + 1e-6), "shift"))
        proto.graph.node.insert(0, onnx.helper.make_node("Mul", [name, "shift"], ["shifted"]))

    changed(path, shift)
    for a in verify(path, model, x).agreements:
        assert a.integers.unequal > 0 and a.integers.largest_step == 1 and a.integers.tie_distance < 1e-3


def test_modes_are_kept_and_training_does_not_matter(exported):
    path, model, x = exported
    model.train()
    model[1].eval()
    before = [m.training for m in model.modules()]
    assert verify(path, model, x, executors=("onnxruntime", )).agreements[0].close == 6
    assert [m.training for m in model.modules()] == before


def test_a_model_without_activation_quantizers_has_no_integers(tmp_path):
    model = quantize(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)), act_bit_width=None).eval()
    path = export_qcdq(model, images32(0), tmp_path / "m.onnx")
    agreement, = verify(path, model, images32(0), executors=("onnxruntime", )).agreements
    assert agreement.integers is None and "no activation quantizer" in agreement.integers_missing and agreement.close == 4


class TestDamage:

    @pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
    def test_truncated(self, exported, kept):
        path, model, x = exported
        content = path.read_bytes()
        path.write_bytes(content[:int(kept * len(content))])
        with pytest.raises(ValueError, match="m.onnx"):
            verify(path, model, x)

    def test_tampered(self, exported):
        path, model, x = exported
        changed(path, scale_by(1.0 + 1e-3), sign=False)
        with pytest.raises(ValueError, match="was changed after it was exported"):
            verify(path, model, x)
        assert verify(path, model, x, allow_changed=True, executors=("onnxruntime", )).agreements[0].images == 6

    def test_a_flipped_byte(self, exported):
        path, model, x = exported
        content = bytearray(path.read_bytes())
        for position in range(50, len(content), len(content) // 25):
            flipped = bytearray(content)
            flipped[position] ^= 0x10
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match="m.onnx"):
                verify(path, model, x, executors=("onnxruntime", ))

    def test_a_graph_that_hangs_in_the_air(self, exported):
        path, model, x = exported
        changed(path, lambda proto: proto.graph.node[-1].input.__setitem__(0, "nothing"))
        with pytest.raises(ValueError, match="not a readable ONNX model.*nothing"):
            verify(path, model, x)

    def test_not_onnx(self, tmp_path, exported):
        _, model, x = exported
        (tmp_path / "x.onnx").write_text("not a model")
        with pytest.raises(ValueError, match="not a readable ONNX model"):
            verify(tmp_path / "x.onnx", model, x)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            verify(tmp_path / "none.onnx", model, x)


class TestBadInput:

    @pytest.mark.parametrize("arguments, error, message", [
        (dict(images=torch.zeros(2, 3, 9, 9)), ValueError, r"inputs of shape \['N', 3, 8, 8\], got images of shape \[2, 3, 9, 9\]"),
        (dict(images=torch.zeros(2, 192)), ValueError, "got images of shape"),
        (dict(images=torch.zeros(0, 3, 8, 8)), ValueError, "empty"),
        (dict(images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), TypeError, "be a tensor of torch.float32, got torch.uint8"),
        (dict(images=np.zeros((2, 3, 8, 8), np.float32)), TypeError, "got ndarray"),
        (dict(labels=[0] * 6), TypeError, "labels must be a tensor of torch.int64 or .*, got list"),
        (dict(model="m.pt"), TypeError, "model must be a torch.nn.Module, got str"),
        (dict(executors=("tflite", )), ValueError, "onnxruntime, qonnx, hls4ml, got"),
        (dict(executors=()), ValueError, "executors"),
        (dict(labels=torch.zeros(2, dtype=torch.int64)), ValueError, r"labels must be \[6\], one for each image, got \[2\]"),
        (dict(batch_size=0), ValueError, "at least 1, got 0")])
    def test_arguments(self, exported, arguments, error, message):
        path, model, x = exported
        with pytest.raises(error, match=message):
            verify(path, **dict(model=model, images=x) | arguments)

    def test_fixed_batches(self, tmp_path):
        model, x = quantized_as("static", "mlp"), images32(0, 6)
        path = export_qonnx(model, x[:4], tmp_path / "m.onnx", dynamic_batch=False)
        with pytest.raises(ValueError, match="batches of 4, of which 6 images are no multiple"):
            verify(path, model, x)
        assert verify(path, model, x[:4]).agreements[1].close == 4

    def test_another_model(self, exported):
        path, _, x = exported
        with pytest.raises(ValueError, match="outputs of shape"):
            verify(path, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)), x, integers=False)


def test_lowered_quant_nodes_are_those_of_qonnx(exported):
    """Two independent definitions of Quant: qonnx's numpy and ours in standard operators."""
    path, _, x = exported
    proto = read_onnx(path)
    assert not any(n.op_type == "Quant" for n in lower_quant(proto).graph.node)
    quantized, = (n.output[0] for n in proto.graph.node if proto.graph.input[0].name in n.input)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(quantized, onnx.TensorProto.FLOAT, None))
    inputs = {proto.graph.input[0].name: x.numpy() * 3}
    first, second = (open_executor(name, proto)(inputs)[quantized] for name in ("onnxruntime", "qonnx"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("bias", ["first", "last"])
def test_nan_is_something_else(tmp_path, bias):
    torch.manual_seed(0)
    net = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval(), 4, 4)
    x = torch.rand(4, 3, 6, 6)
    path = export_qcdq(net, x[:1], tmp_path / "m.onnx")
    assert verify(path, net, x).agrees

    def poison(proto):
        tensor = next(i for i in proto.graph.initializer if list(i.dims) == ([4] if bias == "first" else [5]))
        array = numpy_helper.to_array(tensor).copy()
        array[0] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    changed(path, poison)
    result = verify(path, net, x)
    assert not result.agrees and all(a.exact == a.close == 0 and a.max_abs == np.inf for a in result.agreements)
    with torch.no_grad():
        net[0 if bias == "first" else 3].bias[0] = np.nan
    assert verify(path, net, x).agrees  # torch computes the same NaN


def test_distances():
    inf, nan = np.inf, np.nan
    found = distances(np.float32([1, inf, nan, 1, nan, inf, -inf]), np.float32([3, inf, nan, nan, 1, 1, inf]))
    assert found.tolist() == [2, 0, 0, inf, inf, inf, inf]
    expected = np.float32([[inf, 4, 2]])
    assert _relative(distances(np.float32([[inf, 5, 1]]), expected), expected).tolist() == [0.25]


def test_of_equal_outputs_any_is_the_largest():
    outputs = np.float32([[1, 3, 3, 0]] * 5)
    indices = np.array([[1, 2, 0], [2, 1, 0], [1, 1, 0], [1, 0, 2], [1, 2, 4]])
    assert _are_largest(indices, outputs).tolist() == [True, True, False, False, False]
