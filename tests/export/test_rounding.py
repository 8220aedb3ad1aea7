"""RoundingBounds: no order of float32 sums is farther from the exact value, and what a bound rests on is told."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import oracles
from granq_plugin.export.executors import open_executor
from granq_plugin.export.rounding import RoundingBounds, Unbounded


def graph(nodes, inputs, outputs=("y", ), **constants):
    """A float model of nodes given as ``(operator, inputs, output, attributes)``."""
    made = [helper.make_node(op, list(i), [o], **a) for op, i, o, a in nodes]
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names] for names in (inputs, outputs)]
    stored = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(helper.make_graph(made, "g", *values, stored), opset_imports=opsets, ir_version=9)


def drawn(rng, *shape):
    """Values of very different sizes: sums of them cancel."""
    return (rng.normal(size=shape) * 10.0**rng.uniform(-3, 3, shape)).astype(np.float32)


@given(oracles.SEEDS, st.integers(2, 400))
@settings(max_examples=50)
def test_sums_in_any_order_stay_within_the_bound(seed, terms):
    rng = np.random.default_rng(seed)
    x, w, b = drawn(rng, 1, terms), drawn(rng, terms, 1), drawn(rng, 1)
    exact, bound = RoundingBounds(graph([("Gemm", "xwb", "y", {})], "x", w=w, b=b))("y", {"x": x})
    exact, bound = exact.item(), bound.item()
    products = np.float64(x[0]) * w[:, 0]
    assert exact == pytest.approx(products.sum() + b[0], rel=1e-9, abs=1e-9)
    for _ in range(5):
        order, total = rng.permutation(terms), np.float32(0)
        for i in order:
            total = np.float32(total + x[0, i] * w[i, 0])
        assert abs(float(total + b[0]) - exact) <= bound
    assert abs(float(np.float32(b[0] + (x[0, ::-1] @ w[::-1])[0])) - exact) <= bound
    assert bound <= 2.0**-24 * (terms + 2) * (np.abs(products).sum() + abs(b[0])) * 1.01


def layers(rng):
    """Everything that stands between two quantizers of ours, dynamic ranges included."""
    nodes = [
        ("Conv", "xwb", "c", dict(pads=[1, 1, 1, 1], strides=[2, 1], group=2)),
        ("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], "n", {}), ("Relu", "n", "r", {}),
        ("MaxPool", "r", "m", dict(kernel_shape=[2, 2])), ("Concat", "rr", "k", dict(axis=1)), ("GlobalAveragePool", "k", "g", {}),
        ("Reshape", ["g", "shape"], "f", {}), ("Gemm", ["f", "w2", "b2"], "h", dict(transB=1)), ("Div", "hs", "d", {}),
        ("Add", "dz", "static", {}),
        ("ReduceMin", ["m", "axes"], "lo", dict(keepdims=1)), ("ReduceMax", ["m", "axes"], "hi", dict(keepdims=1)),
        ("Sub", ["hi", "lo"], "range", {}), ("Max", ["range", "least"], "clamped", {}), ("Reciprocal", ["clamped"], "inv", {}),
        ("Mul", ["m", "inv"], "dynamic", {}),
        ("ConvTranspose", ["m", "w3"], "up", dict(strides=[2, 2])), ("AveragePool", ["up"], "average", dict(kernel_shape=[2, 2]))]
    constants = dict(
        w=drawn(rng, 6, 2, 3, 3), b=drawn(rng, 6), gamma=drawn(rng, 6), beta=drawn(rng, 6), mean=drawn(rng, 6),
        variance=np.abs(drawn(rng, 6)) + np.float32(0.01), shape=np.array([0, -1]), w2=drawn(rng, 5, 12), b2=drawn(rng, 5),
        s=np.abs(drawn(rng, 1, 5)) + np.float32(1e-3), z=np.float32(rng.integers(0, 9, (1, 5))), axes=np.array([2, 3]),
        least=np.float32(1e-3), w3=drawn(rng, 6, 2, 3, 3))
    return graph(nodes, "x", ("static", "dynamic", "average"), **constants)


@given(oracles.SEEDS)
@settings(max_examples=20)
def test_onnxruntime_stays_within_the_bound_of_every_operator(seed):
    rng = np.random.default_rng(seed)
    model, x = layers(rng), drawn(rng, 2, 4, 6, 6)
    found, bounds = open_executor("onnxruntime", model)({"x": x}), RoundingBounds(model)
    for name in ("static", "dynamic", "average"):
        exact, bound = bounds(name, {"x": x})
        error = np.abs(found[name] - exact)
        assert (error <= bound).all() and bound.shape == exact.shape
        assert np.median(bound / (np.abs(exact) + 1)) < 1e-2  # it says something


def test_forced_weights_are_the_file_s():
    """Quant and DequantizeLinear of constants are exact numbers of float32."""
    rng = np.random.default_rng(0)
    w, x = rng.integers(-7, 8, (3, 4)).astype(np.int8), drawn(rng, 2, 4)
    scale = np.float32([0.1, 0.3, 0.7])
    nodes = [("DequantizeLinear", ["w", "s", "z"], "v", dict(axis=0)), ("Gemm", "xv", "y", dict(transB=1))]
    exact, _ = RoundingBounds(graph(nodes, "x", w=w, s=scale, z=np.zeros(3, np.int8)))("y", {"x": x})
    np.testing.assert_array_equal(exact, np.float64(x) @ np.float64(w * scale[:, None]).T)


def test_a_range_below_its_rounding_error_has_no_bound():
    """A channel that is constant but for rounding: its scale may be anything."""
    model = graph([("Sub", "xc", "d", {}), ("Sub", "de", "r", {}), ("Reciprocal", "r", "y", {})], "x",
                  c=np.float32(1), e=np.float32(1e-9))
    value, bound = RoundingBounds(model)("y", {"x": np.float32([1 + 1e-6, 1, 3])})
    assert np.isfinite(bound[2]) and value.shape == (3, )
    x = torch.full((1, ), 1.0).numpy()
    sums = graph([("Add", "xc", "d", {}), ("Sub", "de", "r", {}), ("Div", "xr", "y", {})], "x", c=np.float32(1), e=np.float32(2))
    assert np.isinf(RoundingBounds(sums)("y", {"x": x})[1]).all()


@pytest.mark.parametrize("node, message", [
    (("Sigmoid", "x", "y", {}), "Sigmoid"), (("Gemm", "xw", "y", dict(alpha=2.0)), "alpha"),
    (("Cast", "x", "y", dict(to=int(onnx.TensorProto.INT8))), "Cast"),
    (("Conv", "xw", "y", dict(auto_pad="SAME_UPPER")), "auto_pad")])
def test_unknown_operators_are_named(node, message):
    model = graph([node], "x", w=np.zeros((1, 1, 1, 1) if node[0] == "Conv" else (3, 3), np.float32))
    with pytest.raises(Unbounded, match=message):
        RoundingBounds(model)("y", {"x": np.ones((1, 1, 3, 3) if node[0] == "Conv" else (1, 3), np.float32)})
