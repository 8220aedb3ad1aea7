"""ONNX files with what is known of the network in them, and what every reader of their nodes needs."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from granq_plugin.functional import integer_limits
from granq_plugin.reading import existing_file, reason_of

__all__ = [
    "attribute", "check_contents", "constants_of", "load_onnx", "metadata_of", "quant_limits", "read_metadata", "read_onnx",
    "set_metadata"]

MOST_INPUT, MOST_ELEMENTS = 2**22, 2**28
"""Of a sample, and of a tensor whose size can be told before the network runs."""
PREFIX = "granq."
DIGEST = "sha256"


def set_metadata(model, entries: Mapping) -> None:
    """Write entries into an ``onnx.ModelProto``: strings as they are, everything else as JSON; and a digest of the whole model.

    Raises:
        TypeError: for a key that is not a string, or a value that JSON does not know.
    """
    stored = {p.key: p.value for p in model.metadata_props}
    for key, value in entries.items():
        if not isinstance(key, str):
            raise TypeError(f"metadata keys are strings, got {key!r}")
        try:
            stored[PREFIX + key] = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError) as e:
            raise TypeError(f"metadata {key!r}: {value!r} cannot be stored as JSON") from e
    stored.pop(PREFIX + DIGEST, None)
    _replace(model, stored)
    _replace(model, stored | {PREFIX + DIGEST: _digest(model)})


def _replace(model, entries: Mapping) -> None:
    del model.metadata_props[:]
    for key, value in sorted(entries.items()):
        model.metadata_props.add(key=key, value=value)


def _digest(model) -> str:
    """SHA-256 of the model without its digest."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def load_onnx(path: str | Path):
    """Read any tool's ONNX file as an ``onnx.ModelProto``.

    Raises:
        ModuleNotFoundError: without onnx. FileNotFoundError: if there is no such file. ValueError: if it is not an ONNX model, or
        :func:`check_contents` refuses it.
    """
    try:
        import onnx
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("reading an ONNX file needs onnx: pip install 'granq-plugin[export]'", name="onnx") from e
    path = existing_file(path, "model file")
    with _readable(path):
        model = onnx.load(path, load_external_data=False)
        check_contents(model)
        if not model.graph.node:  # an empty or cut file can still be a valid message
            raise ValueError("it holds no graph")
    return model


def read_onnx(path: str | Path, allow_changed: bool = False):
    """Read a valid ONNX file, which is as it was exported.

    Args:
        allow_changed: also accept a file of ours that another tool has changed since.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see :func:`load_onnx`; ValueError also if ONNX's checker refuses it, or
        it was changed.
    """
    model = load_onnx(path)
    import onnx
    with _readable(path):
        onnx.checker.check_model(model)
    expected = metadata_of(model).get(DIGEST)
    if expected is not None and not allow_changed:
        unsigned = onnx.ModelProto()
        unsigned.CopyFrom(model)
        _replace(unsigned, {p.key: p.value for p in model.metadata_props if p.key != PREFIX + DIGEST})
        if _digest(unsigned) != expected:
            raise ValueError(f"{str(path)!r} was changed after it was exported: its contents do not have the SHA-256 that it names")
    return model


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # protobuf's DecodeError, the checker's ValidationError...
        raise ValueError(
            f"{str(path)!r} is not a readable ONNX model: it is damaged, or another kind of file ({reason_of(e)})") from e


def check_contents(model) -> None:
    """Raise a ValueError for what no network of ours has, and what could read other files, run for ever, or fill the memory."""
    import onnx
    from onnx import AttributeProto, TensorProto
    for end in ("input", "output"):
        if model.graph.node and not getattr(model.graph, end):
            raise ValueError(f"its graph has no {end}")
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for a in node.attribute:
            if a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                raise ValueError(f"{node.op_type} {node.name!r} holds a graph of its own: only networks without loops are read")
            tensors += [a.t] if a.type == AttributeProto.TENSOR else []
    if model.functions:
        raise ValueError("it defines functions of its own")
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ValueError(f"tensor {tensor.name!r} is in another file, which is never read")
        if math.prod(tensor.dims) > 8 * tensor.ByteSize():  # one bit each
            raise ValueError(f"tensor {tensor.name!r} declares {list(tensor.dims)} elements and does not hold them")
    for value in model.graph.input:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if any(d < 0 for d in dims) or math.prod(d or 1 for d in dims[1:]) > MOST_INPUT:
            raise ValueError(f"input {value.name!r} declares shape {dims}")
    for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info:
        if math.prod(d.dim_value for d in value.type.tensor_type.shape.dim) > MOST_ELEMENTS:
            raise ValueError(f"tensor {value.name!r} has shape {[d.dim_value for d in value.type.tensor_type.shape.dim]}")


def metadata_of(model) -> dict[str, str]:
    """Our entries of an ``onnx.ModelProto``, without their prefix."""
    return {p.key.removeprefix(PREFIX): p.value for p in model.metadata_props if p.key.startswith(PREFIX)}


def read_metadata(path: str | Path) -> dict[str, str]:
    """What an exported file says of itself: format, bit widths, plugin version, and what the caller of the export added.

    Raises:
        FileNotFoundError, ValueError: see :func:`granq_plugin.export.files.read_onnx`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from granq_plugin import quantize
        >>> from granq_plugin.export import export_qonnx
        >>> net = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), weight_bit_width=4, act_bit_width=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     said = read_metadata(export_qonnx(net, torch.rand(1, 3, 6, 6), f"{folder}/net.onnx", metadata={"author": "me"}))
        >>> said["format"], said["author"]
        ('qonnx', 'me')
    """
    return metadata_of(read_onnx(path))


def attribute(node, name: str, default):
    """A node's attribute, or ``default``."""
    from onnx import helper
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def quant_limits(node, bits: int) -> tuple[int, int]:
    """The smallest and the largest integer of a Quant node."""
    return integer_limits(bits, bool(attribute(node, "signed", 1)), bool(attribute(node, "narrow", 1)))


def constants_of(model) -> dict[str, np.ndarray]:
    """The tensors of numbers that a graph holds: initializers, and those of Constant nodes."""
    from onnx import helper, numpy_helper
    found = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for node in model.graph.node:
        for a in node.attribute if node.op_type == "Constant" else ():
            if a.name == "value":
                found[node.output[0]] = numpy_helper.to_array(a.t)
            elif a.name in dtypes:
                found[node.output[0]] = np.asarray(helper.get_attribute_value(a), dtypes[a.name])
    return found
