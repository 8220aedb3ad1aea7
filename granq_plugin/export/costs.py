"""What an exported network costs: :func:`report` counts operations and memory, layer by layer."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from granq_plugin.export.describe import FLOAT_BITS
from granq_plugin.export.executors import open_executor, with_input_shapes
from granq_plugin.export.files import metadata_of, read_onnx
from granq_plugin.export.integers import find_quantizers
from granq_plugin.reading import reason_of

__all__ = ["MAC_OPS", "CostReport", "LayerCost", "report"]

MAC_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators whose output holds only values of their first input (or zeros), so that it has that input's bit width.
_PASS_ON = {"MaxPool", "Flatten", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Relu", "Slice", "Gather"}


@dataclass(frozen=True)
class LayerCost:
    """One layer, for one sample.

    Attributes:
        name: the torch layer's, or the node's. op: its operator. macs: multiply-accumulates.
        weights, activations: how many values it reads; weight_bits, activation_bits: the bits of each (32: float).
    """
    name: str
    op: str
    macs: int
    weights: int
    weight_bits: int
    activations: int
    activation_bits: int

    def bit_operations(self, weight_bits: int | None = None, activation_bits: int | None = None) -> int:
        """Multiply-accumulates times the bits of both factors; the layer's own bits unless others are given."""
        return self.macs * (weight_bits or self.weight_bits) * (activation_bits or self.activation_bits)


@dataclass(frozen=True)
class CostReport:
    """What :func:`report` found. Memory is in bytes, activations are what the layers read, batch 1.

    Attributes:
        path: the file. layers: in the order of execution. metadata: what the file says of itself.
    """
    path: str
    layers: tuple[LayerCost, ...]
    metadata: dict[str, str]

    def totals(self, bits: int | None = None) -> dict[str, float]:
        """``macs``, ``bit_operations``, ``weight_bytes``, ``activation_bytes``; at ``bits`` everywhere, or as the file is."""
        return dict(
            macs=sum(layer.macs for layer in self.layers),
            bit_operations=sum(layer.bit_operations(bits, bits) for layer in self.layers),
            weight_bytes=sum(layer.weights * (bits or layer.weight_bits) for layer in self.layers) / 8,
            activation_bytes=sum(layer.activations * (bits or layer.activation_bits) for layer in self.layers) / 8)

    def __str__(self) -> str:
        rows = [("layer", "operator", "W", "A", "MACs", "bit operations", "weights (B)", "activations (B)")]
        rows += [(layer.name, layer.op, str(layer.weight_bits), str(layer.activation_bits), f"{layer.macs:,}",
                  f"{layer.bit_operations():,}", f"{layer.weights * layer.weight_bits / 8:,.0f}",
                  f"{layer.activations * layer.activation_bits / 8:,.0f}") for layer in self.layers]
        for label, bits in (("total", None), ("at 8 bit", 8), ("at float32", FLOAT_BITS)):
            t = self.totals(bits)
            rows.append((label, "", str(bits or ""), str(bits or ""), f"{t['macs']:,}", f"{t['bit_operations']:,}",
                         f"{t['weight_bytes']:,.0f}", f"{t['activation_bytes']:,.0f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join([self.path] + ["  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows])


def report(path: str | Path) -> CostReport:
    """Bit operations and memory of an exported network, with qonnx's cost analysis; sparsity is not discounted.

    Bit widths are those that the file names (its metadata); in a file of another tool, those of its Quant nodes. What no
    quantizer precedes, such as pooled features, counts as float.

    Raises:
        FileNotFoundError, ValueError: see :func:`granq_plugin.export.files.read_onnx`; ValueError also for a network without a
            convolution, linear layer or matrix product. ModuleNotFoundError: without qonnx (extra ``export``).

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from granq_plugin import quantize
        >>> from granq_plugin.export import export_qonnx
        >>> net = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), weight_bit_width=4, act_bit_width=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     costs = report(export_qonnx(net, torch.rand(1, 3, 6, 6), f"{folder}/net.onnx"))
        >>> costs.totals()["weight_bytes"], costs.totals(32)["weight_bytes"]
        (108.0, 864.0)
    """
    proto = read_onnx(path, allow_changed=True)
    try:
        return _report(proto, path)
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as e:  # qonnx asserts, and looks up what another tool's graph may lack
        raise ValueError(f"{str(path)!r} cannot be analysed: {type(e).__name__}: {reason_of(e)}") from e


def _report(proto, path: str | Path) -> CostReport:
    from qonnx.analysis.inference_cost import inference_cost
    from qonnx.core.datatype import DataType
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.general import GiveUniqueNodeNames

    shapes = {i.name: [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    batch = next(iter(shapes.values()))[0]
    graph = ModelWrapper(with_input_shapes(proto, shapes)).transform(GiveUniqueNodeNames())
    place = {n.output[0]: i for i, n in enumerate(proto.graph.node)}  # qonnx sorts branches into another order
    nodes = sorted((n for n in graph.graph.node if n.op_type in MAC_OPS), key=lambda n: place.get(n.output[0], len(place)))
    if not nodes:
        raise ValueError(f"{str(path)!r} holds no convolution, linear layer or matrix product")
    for tensor, shape in _shapes_in_a_run(proto, shapes, [t for n in nodes for t in (*n.input[:2], n.output[0])]).items():
        graph.set_tensor_shape(tensor, shape)
    metadata = metadata_of(proto)
    names, weight_bits = _weight_bits(graph, nodes, metadata)
    activation_bits = _activation_bits(graph, proto, nodes, metadata)
    for node, bits in zip(nodes, weight_bits):  # the analysis looks for constants: weights behind a Quant node are none to it
        if graph.get_initializer(node.input[1]) is None and _is_constant(graph, node.input[1]):
            graph.set_initializer(node.input[1], _ones(graph.get_tensor_shape(node.input[1])))
        graph.set_tensor_datatype(node.input[1], DataType[f"UINT{bits}" if bits < FLOAT_BITS else "FLOAT32"])
    costs = inference_cost(graph, discount_sparsity=False, cost_breakdown=True)["node_cost"]
    layers = []
    for node, name, w_bits, a_bits in zip(nodes, names, weight_bits, activation_bits):
        read, kernel = (graph.get_tensor_shape(i) for i in node.input[:2])
        if node.op_type == "ConvTranspose":  # which qonnx does not count
            macs, weights = math.prod(read) * math.prod(kernel[1:]), math.prod(kernel)
        else:
            macs, weights = (_sum(costs[node.name], prefix) for prefix in ("op_mac", "mem_w"))
        layers.append(LayerCost(
            name, node.op_type, int(macs) // batch, int(weights), w_bits, math.prod(read) // batch, a_bits))
    return CostReport(str(path), tuple(layers), metadata)


def _shapes_in_a_run(proto, shapes: dict, tensors: list[str]) -> dict[str, list[int]]:
    """Shapes of tensors when the model runs on zeros: inference of shapes stops at the padding that the older exporter computes."""
    import numpy as np
    from onnx import TensorProto, helper
    proto = with_input_shapes(proto, shapes)
    known = {o.name for o in proto.graph.output} | set(shapes)
    constants = {i.name: list(i.dims) for i in proto.graph.initializer}
    wanted = [t for t in dict.fromkeys(tensors) if t not in known and t not in constants]
    proto.graph.output.extend(helper.make_tensor_value_info(t, TensorProto.FLOAT, None) for t in wanted)
    values = open_executor("onnxruntime", proto)({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    found = shapes | constants | {name: list(value.shape) for name, value in values.items()}
    return {t: found[t] for t in tensors}


def _sum(cost: dict, prefix: str) -> float:
    return sum(v for k, v in cost.items() if k.startswith(prefix))


def _ones(shape):
    import numpy as np
    return np.ones(shape, np.float32)


def _is_constant(graph, tensor: str) -> bool:
    if graph.get_initializer(tensor) is not None:
        return True
    node = graph.find_producer(tensor)
    return node is not None and all(_is_constant(graph, i) for i in node.input if i)


def _named_bits(metadata: dict[str, str], key: str) -> list[tuple[str, int]]:
    try:
        named = [(str(name), int(bits)) for name, bits in json.loads(metadata.get(key, "[]"))]
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"the file's {key} are no list of names and bit widths: {reason_of(e)}") from e
    if not all(1 <= bits <= FLOAT_BITS for _, bits in named):
        raise ValueError(f"the file's {key} must be 1 to {FLOAT_BITS}, got {[bits for _, bits in named]}")
    return named


def _weight_bits(graph, nodes, metadata: dict[str, str]) -> tuple[list[str], list[int]]:
    named = _named_bits(metadata, "weight_bit_widths")
    if len(named) == len(nodes):
        return [name for name, _ in named], [bits for _, bits in named]
    return [n.name for n in nodes], [_quant_bits(graph, n.input[1]) for n in nodes]


def _activation_bits(graph, proto, nodes, metadata: dict[str, str]) -> list[int]:
    """The bits of what each node reads: of the quantizer that its input comes from, past operators that keep values."""
    named, quantizers = _named_bits(metadata, "activation_bit_widths"), find_quantizers(proto)
    known = {q.value: bits for q, (_, bits) in zip(quantizers, named)} if len(named) == len(quantizers) else {}
    result = []
    for node in nodes:
        tensor = node.input[0]
        while tensor not in known:
            producer = graph.find_producer(tensor)
            if producer is None or producer.op_type not in _PASS_ON:
                break
            tensor = producer.input[0]
        bits = _quant_bits(graph, tensor)  # first what the node says: clean-up may have reordered the quantizers
        result.append(known.get(tensor, FLOAT_BITS) if bits == FLOAT_BITS else bits)
    return result


def _quant_bits(graph, tensor: str) -> int:
    node = graph.find_producer(tensor)
    bits = graph.get_initializer(node.input[3]) if node is not None and node.op_type == "Quant" else None
    return FLOAT_BITS if bits is None else int(bits)
