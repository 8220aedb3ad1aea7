"""The integers of a network's activations, in torch and in an exported file, quantizer by quantizer.

Sums of a convolution depend on the order in which a program adds, in the last bits of float32. Where such a sum lies on a rounding
tie of the next quantizer, two correct programs choose neighbouring integers, and everything after that differs. So the file's
quantizers are compared one at a time: each layer is given torch's own activations, and its integers are compared with torch's.
"""

from dataclasses import dataclass

import numpy as np
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin.core.proxy import GranQDynamicActProxy

__all__ = [
    "IntegerCheck",
    "IntegerTally",
    "QuantizerRecord",
    "find_quantizers",
    "force_activations",
    "integers_of",
    "match_quantizers",
    "record_quantizers",
    "show_integers",
]


@dataclass(frozen=True)
class QuantizerRecord:
    """One call of one activation quantizer in torch.

    Attributes:
        name: of its proxy. value: ``[B, C, ...]``, dequantized. exact: the real-valued positions on the integer grid, before
        rounding. integers: those, rounded (and clamped).
    """
    name: str
    value: np.ndarray
    exact: np.ndarray
    integers: np.ndarray


@dataclass(frozen=True)
class IntegerCheck:
    """Integers of a file against torch's, each layer on torch's own activations.

    Attributes:
        quantizers: how many activation quantizers were compared. values: how many integers. unequal: those that differ.
        largest_step: the largest difference. tie_distance: how far from a rounding tie (a half) torch's value is, at most, where
        they differ, in steps; two correct programs differ only at about 0.
        output_error: largest difference of the outputs, relative to the sample's largest output, on torch's last activations.
    """
    quantizers: int
    values: int
    unequal: int
    largest_step: int
    tie_distance: float
    output_error: float

    @property
    def equal_but_for_ties(self) -> bool:
        """True if no integer differs, or by one alone where torch's value lies within 0.001 steps of a rounding tie."""
        return self.unequal == 0 or (self.largest_step == 1 and self.tie_distance <= 1e-3)


class record_quantizers:
    """While it lasts, collect a :class:`QuantizerRecord` of every activation quantizer's call, in order, in ``records``."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.records, self._hooks = model, [], []

    def __enter__(self) -> "record_quantizers":
        for name, proxy in self.model.named_modules():
            if isinstance(proxy, ActQuantProxyFromInjectorBase) and proxy.is_quant_enabled:
                self._hooks.append(proxy.fused_activation_quant_proxy.register_forward_hook(self._recorder(name, proxy)))
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def _recorder(self, name: str, proxy: nn.Module):

        def record(fused: nn.Module, inputs: tuple[Tensor], output) -> None:
            x, (value, scale, zero_point, _) = fused.activation_impl(inputs[0]).detach(), output
            if x.dim() == 0:  # Brevitas's sentinel
                return
            if isinstance(proxy, GranQDynamicActProxy):
                quantizer = fused.tensor_quant
                x = quantizer.clamp(x)
                inv_scale, offset = GF.inverse_scale(*GF.channel_range(x, quantizer.channel_axis), quantizer.bit_width)
                exact = x * inv_scale - offset
                integers = exact.round()
            else:
                exact = x / scale + zero_point
                integers = (value / scale + zero_point).round()
            self.records.append(QuantizerRecord(name, *(t.detach().cpu().numpy() for t in (value, exact, integers))))

        return record


@dataclass(frozen=True)
class FileQuantizer:
    """An activation quantizer in an ONNX graph: names of the tensors with its values and with its integers.

    Attributes:
        scale, zero_point: where the file has no integers (Quant), those of the node, as arrays; otherwise None.
    """
    value: str
    integers: str
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None


def find_quantizers(model) -> list[FileQuantizer]:
    """The activation quantizers of an ``onnx.ModelProto`` that we exported, in order of execution."""
    from onnx import numpy_helper
    nodes = model.graph.node
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    constants |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in nodes if n.op_type == "Constant"}
    producer = {output: n for n in nodes for output in n.output}
    consumers = {}
    for n in nodes:
        for i in n.input:
            consumers.setdefault(i, []).append(n)

    def only_consumer(node, *op_types: str):
        following = consumers.get(node.output[0], [])
        return following[0] if len(following) == 1 and following[0].op_type in op_types else None

    found = []
    for node in nodes:
        if node.op_type == "Quant" and not _is_constant(node.input[0], producer, constants):
            found.append(FileQuantizer(node.output[0], node.output[0], constants[node.input[1]], constants[node.input[2]]))
        elif node.op_type == "DequantizeLinear" and not _is_constant(node.input[0], producer, constants):
            found.append(FileQuantizer(node.output[0], node.input[0]))
        elif node.op_type == "Round":
            clip = only_consumer(node, "Clip")
            last = only_consumer(node, "Add") if clip is None else only_consumer(clip, "Sub") or clip
            end = last and only_consumer(last, "Div" if clip is None else "Mul")
            if end:
                found.append(FileQuantizer(end.output[0], (clip or node).output[0]))
    return found


def _is_constant(name: str, producer: dict, constants: dict) -> bool:
    if name in constants:
        return True
    return name in producer and all(_is_constant(i, producer, constants) for i in producer[name].input if i)


def show_integers(model, quantizers: list[FileQuantizer]):
    """A copy of the model whose further outputs are the quantizers' integers."""
    import onnx
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.value_info[:]
    existing = {o.name for o in shown.graph.output}
    for name in dict.fromkeys(q.integers for q in quantizers):
        if name not in existing:
            shown.graph.output.append(_output(shown, name))
    return shown


def force_activations(model, quantizers: list[FileQuantizer]):
    """A copy of the model in which every layer reads the quantized activations from new inputs, not from the layers before it.

    Returns:
        ``(model, names)``: the copy, with further outputs as in :func:`show_integers`, and the names of the inputs that take the
        quantizers' values.
    """
    from onnx import TensorProto, helper
    forced = show_integers(model, quantizers)
    names = {q.value: f"granq_forced_{i}" for i, q in enumerate(quantizers)}
    for node in forced.graph.node:
        for i, name in enumerate(node.input):
            if name in names:
                node.input[i] = names[name]
    forced.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names.values())
    return forced, list(names.values())


def match_quantizers(found: list[np.ndarray], records: list[QuantizerRecord]) -> list[int] | None:
    """Which record belongs to each of the file's quantizers; tools that sort graphs change their order.

    Args:
        found: integers of the file's quantizers, from a run of the whole file on the batch of the records.

    Returns:
        Indices of records of the same shape, with the fewest differing integers, and among equals in order. None: there are none.
    """
    free, order = list(range(len(records))), []
    for integers in found:
        fitting = [i for i in free if records[i].integers.shape == integers.shape]
        if not fitting:
            return None
        order.append(min(fitting, key=lambda i: int((records[i].integers != integers).sum())))
        free.remove(order[-1])
    return order


def _output(model, name: str):
    """An output for a tensor of integers: float, or of the type that QuantizeLinear gave them (its zero point's)."""
    from onnx import TensorProto, helper
    producer = {output: n for n in model.graph.node for output in n.output}
    node = producer[name]
    if node.op_type == "Clip":
        node = producer.get(node.input[0], node)
    if node.op_type != "QuantizeLinear":
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    types = {i.name: i.data_type for i in model.graph.initializer}
    types |= {n.output[0]: n.attribute[0].t.data_type for n in model.graph.node if n.op_type == "Constant"}
    return helper.make_tensor_value_info(name, types[node.input[2]], None)


class IntegerTally:
    """Adds up an :class:`IntegerCheck` over batches."""

    def __init__(self) -> None:
        self.quantizers = self.values = self.unequal = self.largest_step = 0
        self.tie_distance = self.output_error = 0.0

    def add(self, records: list[QuantizerRecord], integers: list[np.ndarray], output_error: float) -> None:
        """Compare one batch's records with the file's integers."""
        self.quantizers, self.output_error = len(records), max(self.output_error, output_error)
        for record, found in zip(records, integers):
            difference = np.abs(found.astype(np.float64) - record.integers)
            unequal = difference != 0
            self.values += difference.size
            self.unequal += int(unequal.sum())
            if unequal.any():
                position = record.exact[unequal]
                self.largest_step = max(self.largest_step, int(difference.max()))
                self.tie_distance = max(self.tie_distance, float(np.abs(np.abs(position - np.round(position)) - 0.5).max()))

    def result(self) -> IntegerCheck:
        return IntegerCheck(
            self.quantizers, self.values, self.unequal, self.largest_step, self.tie_distance, self.output_error)


def integers_of(quantizer: FileQuantizer, outputs: dict[str, np.ndarray]) -> np.ndarray:
    """The integers of a file's quantizer from the tensors of a run."""
    tensor = outputs[quantizer.integers]
    if quantizer.scale is None:
        return tensor
    return np.round(tensor / quantizer.scale + quantizer.zero_point)


