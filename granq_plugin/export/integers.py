"""The integers of a network's activations, in torch and in an exported file, quantizer by quantizer.

Sums of a convolution depend on the order in which a program adds, in the last bits of float32. Where such a sum lies on a rounding
tie of the next quantizer, two correct programs choose neighbouring integers, and everything after that differs. So the file's
quantizers are compared one at a time: each layer is given torch's own activations, and its integers are compared with torch's.

What is then proved of every integer that differs: a correct program's value lies within e of the exact one
(:class:`granq_plugin.export.rounding.RoundingBounds`), so two of them lie within 2 e of each other, and round to different integers
only if a tie lies between them: torch's own value must be within 2 e of a tie. A file that computes something else breaks this.
"""

from dataclasses import dataclass

import numpy as np
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin.core.proxy import GranQDynamicActProxy
from granq_plugin.export.files import attribute, constants_of
from granq_plugin.export.rounding import RoundingBounds, U, Unbounded

__all__ = [
    "IntegerCheck",
    "IntegerTally",
    "QuantizerRecord",
    "distances",
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
            rounding. integers: those, rounded (and clamped). The grid of a dynamic quantizer has its 0 at the value 0: its offset,
            which two programs may round differently without another result, is not subtracted.
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
        largest_step: the largest difference; infinite where one of the two has no number.
        tie_distance: how far from a rounding tie (a half) torch's value is, at most, where they differ, in steps.
        bound_used: the largest part of what float32 rounding can explain (twice the bound of one program) that a differing integer
            needs; above 1, the two do not compute the same.
        unbounded: the operator for which no bound is known, if any.
        output_error: largest difference of the outputs, relative to the sample's largest output, on torch's last activations.
    """
    quantizers: int
    values: int
    unequal: int
    largest_step: float
    tie_distance: float
    bound_used: float
    unbounded: str
    output_error: float

    @property
    def equal_but_for_ties(self) -> bool:
        """True if rounding explains every integer that differs; without a bound, if they differ by one alone where torch's value
        lies within 0.001 steps of a tie."""
        if self.unbounded:
            return self.largest_step <= 1 and self.tie_distance <= 1e-3
        return self.bound_used <= 1


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
                exact = x * inv_scale
                integers = (exact - offset).round() + offset
            else:
                exact = x / scale + zero_point
                integers = (value / scale + zero_point).round()
            self.records.append(QuantizerRecord(name, *(t.detach().cpu().numpy() for t in (value, exact, integers))))

        return record


@dataclass(frozen=True)
class FileQuantizer:
    """An activation quantizer in an ONNX graph: names of the tensors with its values and with its integers.

    Attributes:
        position: the tensor in front of it, None if it is not found; divided by step, plus shift, it is what is rounded.
        axis: where a step ``[C]`` stands.
        scale, zero_point: where the file has no integers (Quant), those of the node, as arrays; otherwise None.
    """
    value: str
    integers: str
    position: str | None = None
    step: np.ndarray | float = 1.0
    shift: np.ndarray | float = 0.0
    axis: int = 1
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None


def find_quantizers(model) -> list[FileQuantizer]:
    """The activation quantizers of an ``onnx.ModelProto`` that we exported, in order of execution."""
    nodes = model.graph.node
    constants = constants_of(model)
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
            scale, zero_point = (constants.get(i) for i in node.input[1:3])
            if scale is None or zero_point is None:
                continue  # computed: then there are fewer than torch has, and the caller says so
            found.append(FileQuantizer(node.output[0], node.output[0], node.input[0], scale, zero_point, 1, scale, zero_point))
        elif node.op_type == "DequantizeLinear" and not _is_constant(node.input[0], producer, constants):
            found.append(FileQuantizer(node.output[0], node.input[0], *_before_quantize_linear(node, producer, constants)))
        elif node.op_type == "Round":
            clip = only_consumer(node, "Clip")
            last = only_consumer(node, "Add") if clip is None else only_consumer(clip, "Sub") or clip
            end = last and only_consumer(last, "Div" if clip is None else "Mul")
            before = producer.get(node.input[0])
            if end and clip is not None:
                found.append(FileQuantizer(end.output[0], clip.output[0], node.input[0]))
            elif end:  # dynamic: (round(s x - z) + z) / s
                position = before.input[0] if before is not None and before.op_type == "Sub" else None
                found.append(FileQuantizer(end.output[0], last.output[0], position))
    return found


def _before_quantize_linear(node, producer: dict, constants: dict) -> tuple:
    """``(position, step, shift, axis)`` of the QuantizeLinear in front of a DequantizeLinear; ``()`` if there is none."""
    node = producer.get(node.input[0])
    while node is not None and node.op_type == "Clip":
        node = producer.get(node.input[0])
    if node is None or node.op_type != "QuantizeLinear" or node.input[1] not in constants:
        return ()
    return node.input[0], constants[node.input[1]], 0.0, attribute(node, "axis", 1)


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


def distances(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """``|found - expected|`` in float64: 0 where they are equal, also as infinities or NaN; infinite where one of them is NaN."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(found.astype(np.float64) - expected)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    return np.where(same, 0.0, np.nan_to_num(difference, nan=np.inf, posinf=np.inf))


class IntegerTally:
    """Adds up an :class:`IntegerCheck` over batches.

    Args:
        forced: the model of :func:`force_activations`. quantizers: of :func:`find_quantizers`.
    """

    def __init__(self, forced, quantizers: list[FileQuantizer]) -> None:
        self.found, self.bounds = quantizers, RoundingBounds(forced)
        self.quantizers = self.values = self.unequal = 0
        self.largest_step = self.tie_distance = self.bound_used = self.output_error = 0.0
        self.unbounded = ""

    def add(self, inputs: dict[str, np.ndarray], records: list[QuantizerRecord], integers: list[np.ndarray],
            output_error: float) -> None:
        """Compare one batch's records with the file's integers; inputs: what the forced model was run on."""
        self.quantizers, self.output_error = len(records), max(self.output_error, output_error)
        for quantizer, record, found in zip(self.found, records, integers):
            difference = distances(found, record.integers)
            # of a dynamic channel that is constant, the one integer is so large that float32 has no neighbour within 2 of it
            unequal = difference > np.nan_to_num(np.abs(record.integers)) * 2.0**-22
            difference[~unequal] = 0
            self.values += difference.size
            if unequal.any():
                self.unequal += int(unequal.sum())
                self.largest_step = max(self.largest_step, float(difference.max()))
                distance = np.nan_to_num(np.abs(np.abs(record.exact - np.round(record.exact)) - 0.5), nan=np.inf)
                self.tie_distance = max(self.tie_distance, float(distance[unequal].max()))
                samples = np.flatnonzero(unequal.reshape(len(unequal), -1).any(1))
                apart = self._apart(quantizer, {name: x[samples] for name, x in inputs.items()})
                if apart is not None:
                    needed = distance[samples] + difference[samples] - 1  # two steps need a whole one between two ties
                    used = np.nan_to_num((needed / apart)[unequal[samples]], nan=np.inf)
                    self.bound_used = max(self.bound_used, float(used.max()))

    def _apart(self, quantizer: FileQuantizer, inputs: dict[str, np.ndarray]) -> np.ndarray | None:
        """How far two correct programs' values can be apart in front of a quantizer, in steps; None if that is not known."""
        try:
            if quantizer.position is None:
                raise Unbounded("what its quantizer rounds is not found in the file")
            value, error = self.bounds(quantizer.position, inputs)
        except Unbounded as e:
            self.unbounded = str(e)
            return None
        step = np.asarray(quantizer.step, np.float64)
        if step.ndim == 1:
            step = step.reshape([-1 if a == quantizer.axis % value.ndim else 1 for a in range(value.ndim)])
        scaled, shifted = np.abs(value / step), np.abs(value / step + quantizer.shift)
        # two roundings: the division, or multiplication, to the grid, and the zero point's addition; never 0
        return 2 * (error / np.abs(step) + U * (scaled + np.maximum(scaled, shifted))) + np.finfo(np.float32).tiny

    def result(self) -> IntegerCheck:
        return IntegerCheck(self.quantizers, self.values, self.unequal, self.largest_step, self.tie_distance, self.bound_used,
                            self.unbounded, self.output_error)


def integers_of(quantizer: FileQuantizer, outputs: dict[str, np.ndarray]) -> np.ndarray:
    """The integers of a file's quantizer from the tensors of a run."""
    tensor = outputs[quantizer.integers]
    if quantizer.scale is None:
        return tensor
    return np.round(tensor / quantizer.scale + quantizer.zero_point)
