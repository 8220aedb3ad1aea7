"""Running files: Quant nodes of every kind in standard operators, and where a network is cut for hls4ml."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import oracles
from granq_plugin.export import export_qonnx
from granq_plugin.export.executors import lower_quant, open_executor, split_for_hls4ml
from granq_plugin.export.files import read_onnx
from networks import images32, quantized_as


def quant_graph(scale, zero_point, bits, bit_width_as_input=False, **attributes):
    """x -> Quant -> y."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3, "L"]) for n in "xy")
    constants = [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in (("s", scale), ("z", zero_point), ("b", bits))]
    inputs = [x] + [helper.make_tensor_value_info("b", TensorProto.FLOAT, [])] * bit_width_as_input
    node = helper.make_node("Quant", ["x", "s", "z", "b"], ["y"], domain="qonnx.custom_op.general", **attributes)
    graph = helper.make_graph([node], "g", inputs, [y], constants[:2] if bit_width_as_input else constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("qonnx.custom_op.general", 2)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@given(oracles.SEEDS, st.integers(1, 16), st.booleans(), st.booleans())
def test_lowered_quant_is_the_formula_and_qonnxs(seed, bits, signed, narrow):
    if signed and bits == 1:
        bits = 2  # qonnx makes these bipolar
    rng = np.random.default_rng(seed)
    x = (rng.integers(-40, 40, (2, 3, 5)) / 2).astype(np.float32)  # ties
    scale = rng.choice([0.25, 0.3, 1.0], (1, 3, 1)).astype(np.float32)
    zero_point = rng.integers(0, 2**bits, (1, 3, 1)).astype(np.float32)
    model = quant_graph(scale, zero_point, bits, signed=int(signed), narrow=int(narrow), rounding_mode="ROUND")
    lo, hi = (-2**(bits - 1), 2**(bits - 1) - 1) if signed else (0, 2**bits - 1)
    lo, hi = (lo + narrow, hi) if signed else (lo, hi - narrow)
    expected = (np.clip(np.rint(x / scale + zero_point), lo, hi) - zero_point) * scale
    for executor in ("onnxruntime", "qonnx"):
        np.testing.assert_array_equal(open_executor(executor, model)({"x": x})["y"], expected)


def test_quant_nodes_that_are_not_known():
    with pytest.raises(ValueError, match="rounds with FLOOR"):
        lower_quant(quant_graph(1, 0, 4, signed=1, narrow=0, rounding_mode="FLOOR"))
    with pytest.raises(ValueError, match="computed bit width"):
        lower_quant(quant_graph(1, 0, 4, bit_width_as_input=True, signed=1, narrow=0))


def test_models_that_no_executor_takes():
    model = helper.make_model(helper.make_graph([helper.make_node("NoSuchOperator", ["x"], ["y"])], "g", *(
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1])] for n in "xy")), opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(ValueError, match="onnxruntime does not take this model"):
        open_executor("onnxruntime", model)


def test_a_network_is_cut_before_its_global_pooling(tmp_path):
    model, x = quantized_as("folded", "shortcuts"), images32(0, 3)
    proto = read_onnx(export_qonnx(model, x, tmp_path / "m.onnx"))
    body, head = split_for_hls4ml(proto)
    assert not {"GlobalAveragePool", "Flatten", "Gemm"} & {n.op_type for n in body.graph.node}
    middle = open_executor("onnxruntime", body)({"input": x.numpy()})
    np.testing.assert_array_equal(
        open_executor("onnxruntime", head)(middle)["output"], open_executor("onnxruntime", proto)({"input": x.numpy()})["output"])


def test_networks_without_a_body_or_a_head(tmp_path):
    proto = read_onnx(export_qonnx(quantized_as("folded", "mlp"), images32(0), tmp_path / "m.onnx"))
    with pytest.raises(ValueError, match="no convolution stands before its Flatten"):
        split_for_hls4ml(proto)
    del proto.graph.node[:]
    assert split_for_hls4ml(proto) == (proto, None)
    assert isinstance(proto, onnx.ModelProto)
