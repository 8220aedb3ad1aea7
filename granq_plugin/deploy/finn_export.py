"""From a folded model to the file that FINN reads: :func:`export_finn`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from granq_plugin.atomic import atomic_path
from granq_plugin.core.proxy import GranQDynamicActProxy, GranQStaticActProxy
from granq_plugin.deploy.finn import check_finn
from granq_plugin.export.costs import MAC_OPS
from granq_plugin.export.files import constants_of, metadata_of, set_metadata
from granq_plugin.export.onnx_export import to_onnx

__all__ = ["export_finn"]


def export_finn(
        model: nn.Module,
        example_input: Tensor,
        path: str | Path,
        *,
        top_k: int | None = None,
        metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a folded model as the QONNX that FINN reads: batch 1, cleaned, datatypes annotated, the rules of FINN checked.

    Args:
        model: the result of :func:`granq_plugin.deploy.fold`, with a quantized input.
        example_input: float tensor ``[B, ...]``; its first sample is used.
        path: the file. It is written whole or not at all.
        top_k: end in the indices of the k largest outputs.
        metadata: further entries for the file: see :func:`granq_plugin.export.export_qonnx`.

    Returns:
        ``path``.

    Raises:
        ValueError: if the model is not folded, its input is not quantized, rules of FINN fail (all of them are named), or top_k is
            not from 1 to the number of outputs; and what :func:`granq_plugin.export.export_qonnx` raises.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from granq_plugin import to_static
        >>> from granq_plugin.deploy import fold, prepare
        >>> images = torch.rand(16, 3, 6, 6)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
        >>> folded = fold(to_static(prepare(net, images[:1]), [images]), images[:1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_finn(folded, images[:1], f"{folder}/net.onnx", top_k=1).name
        'net.onnx'
    """
    with atomic_path(path) as part:
        import onnx
        _check_folded(model)
        if not isinstance(example_input, Tensor):
            raise TypeError(f"example_input must be a tensor, got {type(example_input).__name__}")
        proto = to_onnx(model, example_input[:1], "qonnx", dynamic_batch=False)
        described = metadata_of(proto)
        layers = _weights_of_layers(proto)
        proto = _cleaned(proto, top_k)
        described["weight_bit_widths"] = _in_order_of(_weights_of_layers(proto), layers, described["weight_bit_widths"])
        _check_input_quantized(proto)
        _check_rules(proto)
        set_metadata(proto, described | {"format": "finn"} | dict(metadata or {}))
        onnx.save(proto, part)
    return Path(path)


def _check_folded(model: nn.Module) -> None:
    for name, proxy in model.named_modules():
        if isinstance(proxy, GranQDynamicActProxy):
            raise ValueError(f"activation quantizer {name!r} is dynamic, and FINN has no scales that follow the data: "
                             "make the model static (granq_plugin.to_static), then fold it (granq_plugin.deploy.fold)")
        if isinstance(proxy, GranQStaticActProxy) and proxy.is_quant_enabled and proxy.scale().numel() > 1:
            raise ValueError(f"activation quantizer {name!r} has one scale per channel, on which FINN gets stuck: "
                             "fold the model first (granq_plugin.deploy.fold)")


def _cleaned(proto, top_k: int | None):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.insert_topk import InsertTopK
    from qonnx.util.cleanup import cleanup_model
    graph = cleanup_model(ModelWrapper(_with_stored_constants(proto)))
    if top_k is not None:
        outputs = graph.get_tensor_shape(graph.graph.output[0].name)[-1]
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= outputs:
            raise ValueError(f"top_k must be a whole number from 1 to {outputs}, the number of outputs, got {top_k!r}")
        graph = cleanup_model(graph.transform(InsertTopK(k=top_k)).transform(InferShapes()))
    return graph.transform(InferDataTypes()).model


def _with_stored_constants(proto):
    """A copy with initializers for constants, and for the Identity nodes through which torch shares them: qonnx folds them too,
    but one at a time, and infers all shapes after each."""
    from onnx import ModelProto, numpy_helper
    stored, constants = ModelProto(), constants_of(proto)
    stored.CopyFrom(proto)
    del stored.graph.node[:]
    outputs = {o.name for o in proto.graph.output}
    for node in proto.graph.node:
        if node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in outputs:
            constants[node.output[0]] = constants[node.input[0]]
        elif node.op_type != "Constant" or node.output[0] not in constants:
            stored.graph.node.append(node)
    known = {i.name for i in proto.graph.initializer}
    stored.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items() if name not in known)
    return stored


def _weights_of_layers(proto) -> list[bytes]:
    """The stored weight of every layer, in order of execution."""
    constants = constants_of(proto)
    producer = {output: n for n in proto.graph.node for output in n.output}
    weights = []
    for node in proto.graph.node:
        if node.op_type in MAC_OPS:
            source = node.input[1]
            while source not in constants and source in producer:
                source = producer[source].input[0]
            array = constants.get(source)
            weights.append(b"" if array is None else f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return weights


def _in_order_of(weights: list[bytes], described: list[bytes], names: str) -> str:
    """The description ``[[name, bits]...]`` of layers, sorted as clean-up has sorted them; as it is where it cannot be told."""
    entries, free = json.loads(names), list(range(len(described)))
    if sorted(weights) != sorted(described) or len(entries) != len(weights):
        return names
    order = []
    for weight in weights:
        order.append(next(i for i in free if described[i] == weight))
        free.remove(order[-1])
    return json.dumps([entries[i] for i in order])


def _check_input_quantized(proto) -> None:
    name = proto.graph.input[0].name
    readers = [n for n in proto.graph.node if name in n.input]
    if not readers or any(n.op_type != "Quant" for n in readers):
        raise ValueError(f"the model's input is read by {', '.join(n.op_type for n in readers) or 'nothing'}, not by a quantizer: "
                         "FINN needs a quantized input (granq_plugin.quantize(..., input_bit_width=8))")


def _check_rules(proto) -> None:
    failures = check_finn(proto).failures
    if failures:
        raise ValueError("the model breaks rules of FINN: " + "; ".join(f"{r.rule} ({r.node}): {r.message}" for r in failures))
