"""ONNX files of strangers: nothing outside is read, nothing runs for ever, and sizes are told before memory is taken."""

import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import mutations
from granq_plugin.deploy.finn_onnx import read_onnx as read_for_finn
from granq_plugin.export import report
from granq_plugin.export.files import read_onnx


@pytest.fixture
def model():
    """A linear layer."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 4), ("y", 2)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "layer")], "net", [x], [y],
                              [numpy_helper.from_array(np.ones((4, 2), np.float32), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")


def declared(model):
    model.graph.initializer[0].dims[:] = [2**20, 2**20]


def huge_input(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 10**9


def huge_tensor(model):
    model.graph.initializer.append(numpy_helper.from_array(np.array([10**5, 10**5]), "shape"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["zeros"]))
    model.graph.node.append(helper.make_node("Add", ["y", "zeros"], ["z"]))


def function(model):
    model.functions.add(name="f", domain="mine")


@pytest.mark.parametrize("change, words", [
    (external, "tensor 'w' is in another file, which is never read"), (declared, "declares .* elements and does not hold them"),
    (huge_input, "input 'x' declares shape"), (huge_tensor, "tensor 'zeros' has shape"), (function, "defines functions"),
    (lambda m: mutations._endless_loop(m.graph), "Loop .* holds a graph of its own"),
    (lambda m: m.graph.ClearField("output"), "its graph has no output")])
def test_what_a_network_of_ours_never_has(tmp_path, model, change, words):
    file = tmp_path / "net.onnx"
    (tmp_path.parent / "secret").write_bytes(bytes(32))
    onnx.save(model, file)
    assert read_onnx(file).graph.node[0].name == "layer" and len(read_for_finn(str(file))) and report(file).totals()["macs"] == 8
    change(model)
    file.write_bytes(model.SerializeToString())
    for read in (read_onnx, report, lambda path: read_for_finn(str(path))):
        with pytest.raises(ValueError, match=f"net.onnx.*{words}"):
            read(file)


@pytest.mark.parametrize("value", ["[" * 50_000, "5", "[1]", '[["a", "b"]]', '[["a", 99]]', "{"])
def test_metadata_that_is_no_list_of_bit_widths(tmp_path, model, value):
    model.metadata_props.add(key="granq.weight_bit_widths", value=value)
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="the file's weight_bit_widths"):
        report(tmp_path / "net.onnx")


def test_mutated_files_are_read_or_refused(tmp_path, model):
    """In this process: an exception of another kind fails the test."""
    data, rng, refused = model.SerializeToString(), random.Random(0), 0
    for _ in range(150):
        (tmp_path / "net.onnx").write_bytes(rng.choice(mutations.MUTATIONS["onnx"])(data, rng))
        try:
            report(tmp_path / "net.onnx")
        except ValueError as e:
            refused += "net.onnx" in str(e) or "onnxruntime" in str(e) or "the file's" in str(e)
    assert refused > 75
