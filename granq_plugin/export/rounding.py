"""How far float32 arithmetic can carry a tensor of an ONNX graph from its exact value: :class:`RoundingBounds`.

The standard model of floating point (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 2.2, 3.1, 4.2):
one operation has a relative error of at most u = 2^-24, and a sum of n products, added in any order, with or without fused
multiply-add, an absolute one of at most ``gamma(n) sum |w| |x|``, ``gamma(n) = n u / (1 - n u)``. Errors of the operands are
carried along. So any two correct programs differ by at most twice the bound.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from granq_plugin.export.files import attribute, constants_of, quant_limits

__all__ = ["RoundingBounds", "U", "Unbounded"]

U = 2.0**-24
"""Unit roundoff of float32."""

# The operator on the errors of its data inputs bounds the error of its output: values are moved, or chosen among.
_PASSING = {
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Neg", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze"}  # yapf: disable
_EXTREMES = {"MaxPool", "ReduceMax", "ReduceMin", "GlobalMaxPool"}
_MEANS = {"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"}


class Unbounded(ValueError):
    """An operator whose rounding errors are not known here."""


class RoundingBounds:
    """Bounds of the rounding errors of any tensor in a graph, for given inputs, which are exact.

    Args:
        model: ``onnx.ModelProto`` with float32 arithmetic.
    """

    def __init__(self, model) -> None:
        self.opsets = {o.domain: o.version for o in model.opset_import}
        self.producer = {output: n for n in model.graph.node for output in n.output}
        self.constants = constants_of(model)

    def __call__(self, tensor: str, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """``(value, bound)`` of a tensor, in float64: what exact arithmetic gives, and how far float32 can be from it (infinite for
        the scale of a channel whose range is below its own rounding error).

        Raises:
            Unbounded: if an operator on the way to it is not known.
        """
        known = {name: (_wide(x), 0.0) for name, x in (self.constants | inputs).items()}
        stack = [tensor]
        while stack:
            name = stack[-1]
            if name in known:
                stack.pop()
                continue
            node = self.producer.get(name)
            if node is None:
                raise Unbounded(f"tensor {name!r} is not computed in the graph")
            unknown = [i for i in node.input if i and i not in known]
            if unknown:
                stack += unknown
                continue
            with np.errstate(divide="ignore", invalid="ignore"):  # 0 times an infinite bound
                outputs = self._node(node, [known[i] if i else None for i in node.input])
            known |= dict(zip(node.output, outputs))
        value, bound = known[tensor]
        return np.asarray(value), np.broadcast_to(np.where(np.isnan(bound), np.inf, bound), np.shape(value))

    def _node(self, node, inputs: list) -> list[tuple]:
        """``(value, bound)`` of the node's outputs."""
        kind = node.op_type
        if kind in ("Quant", "DequantizeLinear"):  # of a constant: both programs hold this very number
            return [(self._weight(node, inputs), 0.0)]
        if all(i is None or i[0].dtype.kind != "f" for i in inputs):  # constants, sizes, and arithmetic on them
            return [(_wide(x), 0.0) for x in self._run(node, [None if i is None else i[0] for i in inputs])]
        if kind in _PASSING or kind in _EXTREMES:
            return self._passing(node, inputs)
        rule = getattr(self, f"_{kind.lower()}", None) or (self._mean if kind in _MEANS else None)
        if rule is None:
            raise Unbounded(f"rounding errors of {kind} are not known")
        return [rule(node, inputs)]

    def _run(self, node, inputs: list) -> list[np.ndarray]:
        """The node's outputs by onnx's reference implementation, in the inputs' dtypes."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator
        values = [helper.make_tensor_value_info(n, 0, None) for n in dict.fromkeys(node.input) if n]
        graph = helper.make_graph([node], "node", values, [helper.make_tensor_value_info(n, 0, None) for n in node.output])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in self.opsets.items()])
        return ReferenceEvaluator(model).run(None, {n: x for n, x in zip(node.input, inputs) if n})

    def _weight(self, node, inputs: list[tuple]) -> np.ndarray:
        """In float32, as it is defined."""
        if any(np.any(error) for _, error in inputs):
            raise Unbounded(f"rounding errors of a {node.op_type} that is not a constant's are not known")
        x, scale, zero_point = (np.float32(i[0]) for i in (*inputs, (0, 0))[:3])
        if node.op_type == "Quant":
            limits = quant_limits(node, int(inputs[3][0]))
            return _wide((np.clip(np.round(x / scale + zero_point), *limits) - zero_point) * scale)
        if scale.ndim:
            shape = [1] * x.ndim
            shape[attribute(node, "axis", 1)] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape) if zero_point.ndim else zero_point
        return _wide((x - zero_point) * scale)

    def _passing(self, node, inputs: list) -> list[tuple]:
        data = range(len(inputs)) if node.op_type == "Concat" else (0, )
        values = [None if i is None else i[0] for i in inputs]
        errors = [np.broadcast_to(i[1], i[0].shape).astype(np.float64) if k in data else v
                  for k, (i, v) in enumerate(zip(inputs, values))]
        if node.op_type == "MaxPool":
            return [(_max_pool(node, values[0]), _max_pool(node, errors[0]))]
        found = self._run(node, values)
        if node.op_type in ("Neg", "Relu"):
            return [(found[0], errors[0])]
        if node.op_type == "ReduceMin":
            return [(found[0], -self._run(node, [-errors[0], *errors[1:]])[0])]
        return list(zip(found, self._run(node, errors)))

    # --- one rule for each operator: (node, [(value, bound)]) -> (value, bound)

    @staticmethod
    def _add(node, inputs):
        (a, ea), (b, eb) = inputs
        return _rounded(a + b, ea + eb)

    @staticmethod
    def _sub(node, inputs):
        (a, ea), (b, eb) = inputs
        return _rounded(a - b, ea + eb)

    @staticmethod
    def _mul(node, inputs):
        (a, ea), (b, eb) = inputs
        return _rounded(a * b, np.abs(a) * eb + np.abs(b) * ea + ea * eb)

    @staticmethod
    def _div(node, inputs):
        (a, ea), (b, eb) = inputs
        return _rounded(a / b, np.where(np.abs(b) > eb, (ea + np.abs(a / b) * eb) / (np.abs(b) - eb), np.inf))

    def _reciprocal(self, node, inputs):
        return self._div(node, [(np.float64(1), 0.0), *inputs])

    @staticmethod
    def _max(node, inputs):
        value, error = inputs[0]
        for v, e in inputs[1:]:
            value, error = np.maximum(value, v), np.maximum(error, e)
        return value, error

    def _clip(self, node, inputs):
        limits = [None if i is None else i[0] for i in inputs[1:]] + [None, None]
        return np.clip(inputs[0][0], limits[0], limits[1]), inputs[0][1]

    def _cast(self, node, inputs):
        from onnx import TensorProto
        if attribute(node, "to", 0) not in (TensorProto.FLOAT, TensorProto.DOUBLE):
            raise Unbounded("rounding errors of a Cast to another type than float32 are not known")
        return inputs[0]

    @staticmethod
    def _round(node, inputs):
        value, error = inputs[0]
        nearest = np.round(value)
        return nearest, np.where(np.abs(value - nearest) + error < 0.5, 0.0, 1 + np.floor(error))

    def _mean(self, node, inputs):
        value, error = (np.broadcast_to(i, inputs[0][0].shape).astype(np.float64) for i in inputs[0])
        others = [None if i is None else i[0] for i in inputs[1:]]
        result = self._run(node, [value, *others])[0]
        terms = max(1, value.size // max(1, result.size)) if node.op_type != "AveragePool" else int(
            np.prod(attribute(node, "kernel_shape", [1])))
        return result, self._run(node, [error + _gamma(terms + 1) * (np.abs(value) + error), *others])[0]

    @staticmethod
    def _batchnormalization(node, inputs):
        (x, ex), *parameters = inputs
        shape = [1, -1] + [1] * (x.ndim - 2)
        gamma, beta, mean, variance = (p.reshape(shape) for p, _ in parameters)
        factor = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        # at most 8 roundings, whether the mean is subtracted first or becomes part of the bias
        terms = np.abs(factor) * (np.abs(x) + ex + np.abs(mean)) + np.abs(beta)
        return (x - mean) * factor + beta, np.abs(factor) * ex + _gamma(8) * terms

    def _conv(self, node, inputs):
        return _sum_of_products(lambda x, w: _convolve(node, x, w), inputs, int(np.prod(inputs[1][0].shape[1:])), 1)

    def _convtranspose(self, node, inputs):
        weight = inputs[1][0]
        return _sum_of_products(lambda x, w: _convolve(node, x, w), inputs, weight.shape[0] * int(np.prod(weight.shape[2:])), 1)

    def _gemm(self, node, inputs):
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
            raise Unbounded("rounding errors of a Gemm with alpha, beta or transA are not known")
        turn = np.transpose if attribute(node, "transB", 0) else np.asarray
        return _sum_of_products(lambda x, w: x @ turn(w), inputs, inputs[0][0].shape[-1], -1)

    def _matmul(self, node, inputs):
        return _sum_of_products(np.matmul, inputs, inputs[0][0].shape[-1], -1)


def _sum_of_products(product, inputs: list, terms: int, bias_axis: int) -> tuple[np.ndarray, np.ndarray]:
    (x, ex), (w, ew), *bias = inputs
    ex, ew = np.broadcast_to(ex, x.shape), np.broadcast_to(ew, w.shape)
    value = product(x, w)
    carried = product(ex, np.abs(w)) + product(np.abs(x) + ex, ew) if ex.any() or ew.any() else 0.0
    size = product(np.abs(x) + ex, np.abs(w) + ew)
    if bias and bias[0] is not None:
        b = bias[0][0]
        if b.ndim == 1 and bias_axis == 1:
            b = b.reshape(-1, *[1] * (value.ndim - 2))
        value, size = value + b, size + np.abs(b)
    return value, carried + _gamma(terms + 1) * size


def _gamma(n: int) -> float:
    return n * U / (1 - n * U)


def _rounded(value, error):
    """The error of the operation itself on top of what it carries."""
    return value, error + U * (np.abs(value) + error)


def _wide(x) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def _padding(node, axes: int) -> tuple[list[int], list[int]]:
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or attribute(node, "ceil_mode", 0):
        raise Unbounded(f"rounding errors of {node.op_type} with auto_pad or ceil_mode are not known")
    pads = list(attribute(node, "pads", [0] * 2 * axes))
    return pads[:axes], pads[axes:]


def _padded(node, x: np.ndarray, value: float) -> Tensor:
    before, after = _padding(node, x.ndim - 2)
    pairs = [p for pair in zip(reversed(before), reversed(after)) for p in pair]
    return F.pad(torch.from_numpy(np.array(x)), pairs, value=value)


def _convolve(node, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    axes, w = x.ndim - 2, torch.from_numpy(np.array(weight))
    options = dict(groups=attribute(node, "group", 1), stride=attribute(node, "strides", [1] * axes),
                   dilation=attribute(node, "dilations", [1] * axes))
    if node.op_type == "Conv":
        return (F.conv1d, F.conv2d, F.conv3d)[axes - 1](_padded(node, x, 0.0), w, **options).numpy()
    before, after = _padding(node, axes)
    if before != after:
        raise Unbounded("rounding errors of a ConvTranspose with uneven pads are not known")
    options |= dict(padding=before, output_padding=attribute(node, "output_padding", [0] * axes))
    return (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1](
        torch.from_numpy(np.array(x)), w, **options).numpy()


def _max_pool(node, x: np.ndarray) -> np.ndarray:
    axes = x.ndim - 2
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
    return pool(_padded(node, x, -np.inf), attribute(node, "kernel_shape", None), attribute(node, "strides", [1] * axes),
                dilation=attribute(node, "dilations", [1] * axes)).numpy()
