"""From a quantized torch model to an ONNX file: :func:`export_qonnx` and :func:`export_qcdq`."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from granq_plugin.atomic import atomic_path
from granq_plugin.export.describe import describe
from granq_plugin.export.files import set_metadata
from granq_plugin.modules import check_module, copy_model, is_quantized

__all__ = ["export_qcdq", "export_qonnx", "to_onnx"]

OPSET = 18
"""What the dynamo exporter writes; older ones it would have to translate afterwards."""


def export_qonnx(
        model: nn.Module,
        example_input: Tensor | tuple[Tensor, ...],
        path: str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        dynamo: bool = False,
        dynamic_batch: bool = True) -> Path:
    """Write a quantized model as QONNX: static activations and weights as ``Quant`` nodes, everything else as standard operators.

    Args:
        model: quantized float32 model; it is left as it is, in its mode and on its device.
        example_input: float tensor ``[B, ...]``, or a tuple of them, of the shape that the network takes.
        path: the file. It is written whole or not at all.
        metadata: further entries for the file, e.g. ``{"teacher_sha256": ..., "accuracy": 89.83}``; strings or what JSON knows.
            Bit widths, kinds of ranges, the plugin's version and a digest are always there: :func:`read_metadata`.
        dynamo: export with torch's dynamo exporter instead of the older one (FINN maps only what the older one writes).
        dynamic_batch: leave the size of the first axis open; False: that of the example.

    Returns:
        ``path``.

    Raises:
        TypeError, ValueError: if the model has no quantizer, is not float32, does not run on the example, or cannot be exported.
        OSError: if the file cannot be written. ModuleNotFoundError: without the ``export`` extra.

    Example:
        >>> import tempfile
        >>> from granq_plugin import quantize
        >>> net = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), weight_bit_width=4, act_bit_width=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_qonnx(net, torch.rand(1, 3, 6, 6), f"{folder}/net.onnx").name
        'net.onnx'
    """
    return _export("qonnx", model, example_input, path, metadata, dynamo, dynamic_batch)


def export_qcdq(
        model: nn.Module,
        example_input: Tensor | tuple[Tensor, ...],
        path: str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        dynamo: bool = False,
        dynamic_batch: bool = True) -> Path:
    """Write a quantized model in standard ONNX operators alone (QCDQ: QuantizeLinear, Clip, DequantizeLinear), for onnxruntime.

    Quantizers of more than 8 bits, which QuantizeLinear does not hold at this opset, become Div, Round, Clip and Mul.

    Arguments, result and errors are those of :func:`export_qonnx`.

    Example:
        >>> import tempfile
        >>> from granq_plugin import quantize
        >>> net = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), weight_bit_width=4, act_bit_width=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_qcdq(net, torch.rand(1, 3, 6, 6), f"{folder}/net.onnx").name
        'net.onnx'
    """
    return _export("qcdq", model, example_input, path, metadata, dynamo, dynamic_batch)


def _export(file_format, model, example_input, path, metadata, dynamo, dynamic_batch) -> Path:
    with atomic_path(path) as part:
        import onnx
        proto = to_onnx(model, example_input, file_format, dynamo, dynamic_batch)
        set_metadata(proto, metadata or {})
        onnx.save(proto, part)
    return Path(path)


def to_onnx(model: nn.Module, example_input, file_format: str, dynamo: bool = False, dynamic_batch: bool = True):
    """The model as an ``onnx.ModelProto`` in the format "qonnx" or "qcdq", with what :func:`describe` says of it.

    Arguments and errors are those of :func:`export_qonnx`.
    """
    import onnx
    from brevitas.export.onnx.qonnx.manager import QONNXDynamoManager, QONNXManager
    from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXDynamoManager, StdQCDQONNXManager
    manager = {
        ("qonnx", False): QONNXManager, ("qonnx", True): QONNXDynamoManager,
        ("qcdq", False): StdQCDQONNXManager, ("qcdq", True): StdQCDQONNXDynamoManager}[file_format, dynamo]
    inputs = _checked_inputs(example_input)
    _check_model(model)
    # A copy: where an export fails, Brevitas leaves the model in export mode, and where it does not, in one mode throughout.
    model = copy_model(model).cpu().eval()
    if dynamic_batch and dynamo:  # which takes a size of 1 for a constant
        inputs = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)
    with torch.no_grad():
        outputs = _run(model, inputs)
    description = describe(model, inputs)
    options = _axis_options(inputs, outputs, dynamo, dynamic_batch)
    if isinstance(outputs, QuantTensor):
        model = _Dequantized(model)
        if "dynamic_shapes" in options:  # all inputs are one argument of its forward, *inputs
            options["dynamic_shapes"] = (options["dynamic_shapes"], )
    options |= dict(dynamo=dynamo, keep_initializers_as_inputs=False)
    if dynamo:
        options |= dict(optimize=True, external_data=False, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        try:
            manager.export(model, args=inputs, export_path=str(file), opset_version=OPSET, **options)
            proto = onnx.load(file)
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            exporter = "dynamo" if dynamo else "older"
            reason = str(e.__cause__ or e).strip().split("\n")[0] or type(e).__name__
            raise ValueError(f"the model cannot be exported to {file_format} with torch's {exporter} exporter: {reason}") from e
    set_metadata(proto, description | {"format": file_format})
    return proto


class _Dequantized(nn.Module):
    """A model that returns plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(*inputs)
        return output.value if isinstance(output, QuantTensor) else output


def _checked_inputs(example_input) -> tuple[Tensor, ...]:
    inputs = (example_input, ) if isinstance(example_input, Tensor) else example_input
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example_input must be a tensor or a tuple of tensors, got {type(example_input).__name__}")
    for x in inputs:
        if x.dtype != torch.float32:
            raise TypeError(f"example_input must be float32, got {x.dtype}")
        if x.dim() == 0 or x.numel() == 0:
            raise ValueError(f"example_input must be a batch of at least one sample, got shape {tuple(x.shape)}")
    return tuple(x.detach().cpu() for x in inputs)


def _check_model(model) -> None:
    check_module(model)
    if not is_quantized(model):
        raise ValueError("model has no Brevitas quantizer: quantize it first (granq_plugin.quantize)")
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point() and t.dtype != torch.float32), None)
    if dtype is not None:
        raise ValueError(f"model has {dtype} parameters; the formats are computed in float32: export model.float()")


def _run(model: nn.Module, inputs: tuple[Tensor, ...]):
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    try:
        outputs = model(*inputs)
    except Exception as e:  # the user's forward: anything may come out of it
        reason = str(e).strip() or type(e).__name__
        raise ValueError(f"the model does not run on an example input of shape {shapes}: {reason}") from e
    tensors = outputs if type(outputs) in (tuple, list) else (outputs, )
    if not all(isinstance(t, (Tensor, QuantTensor)) for t in tensors):
        raise TypeError(f"the model must return a tensor or a tuple of tensors, got {type(outputs).__name__}")
    return outputs


def _axis_options(inputs: tuple[Tensor, ...], outputs, dynamo: bool, dynamic_batch: bool) -> dict[str, Any]:
    """Names of inputs and outputs, and their open first axes in the exporter's own terms."""
    outputs = outputs if type(outputs) in (tuple, list) else (outputs, )
    names = [["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))],
             ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]]
    options = dict(input_names=names[0], output_names=names[1])
    if dynamic_batch and dynamo:
        options["dynamic_shapes"] = tuple({0: "batch"} for _ in inputs)
    elif dynamic_batch:
        options["dynamic_axes"] = {name: {0: "batch"} for name in names[0] + names[1]}
    return options
