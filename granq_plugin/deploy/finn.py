"""What FINN (and hls4ml) can map to hardware, as named rules: :func:`check_finn`.

The rules are those that made real networks pass FINN's streamlining and conversion; each says what to do about a failure. They are
written on :class:`Op`, a graph that both a torch model and a QONNX graph are read into.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

__all__ = ["FinnReport", "Op", "Quant", "RuleResult", "check_finn"]


@dataclass(frozen=True)
class RuleResult:
    """One rule that all nodes keep (``passed``, no node), or one node that breaks it; ``message`` says why and what helps."""
    rule: str
    passed: bool
    node: str = ""
    message: str = ""


class FinnReport(list):
    """All :class:`RuleResult`; ``print`` gives a table, one line each, failures marked."""

    @property
    def passed(self) -> bool:
        return all(r.passed for r in self)

    @property
    def failures(self) -> list[RuleResult]:
        return [r for r in self if not r.passed]

    def __str__(self) -> str:
        width = max(len(r.rule) for r in self)
        lines = [f"{'ok  ' if r.passed else 'FAIL'}  {r.rule:{width}}  {r.node + ': ' if r.node else ''}{r.message}".rstrip()
                 for r in self]
        broken = len({r.rule for r in self.failures})
        rules = len({r.rule for r in self})
        return "\n".join([*lines, f"{rules - broken} of {rules} rules kept"])


@dataclass(frozen=True)
class Quant:
    """A quantizer's parameters. scale, zero_point: None where they depend on the input."""
    bits: float | None
    signed: bool
    narrow: bool
    rounding: str
    scale: np.ndarray | None
    zero_point: np.ndarray | None


@dataclass
class Op:
    """A node of the network.

    Attributes:
        kind: input, output, quant, layer (convolution, linear), norm (or any other affine map), relu, add, max_pool, global_pool,
            average_pool, mean, concat, shape (passes values on), channel_pad, multiply, other.
        inputs: where its activations come from. type: the operator's own name.
        quant: of a quant node. weight: of a layer; None if it is float. channel_axis: of the layer's weight, output channels.
        missing: attributes that a convolution should state and does not. per_channel: of a multiplication.
    """
    name: str
    kind: str
    type: str
    inputs: list["Op"]
    quant: Quant | None = None
    weight: Quant | None = None
    channel_axis: int = 0
    missing: tuple[str, ...] = ()
    per_channel: bool = False
    users: list["Op"] = field(default_factory=list)


def check_finn(model) -> FinnReport:
    """Check a network against the rules of FINN.

    Args:
        model: a folded torch model; or a QONNX graph: an onnx ModelProto, qonnx's ModelWrapper, or a path of a file.

    Returns:
        A list with one result for each rule that is kept, and one for each node that breaks one.

    Raises:
        TypeError: for anything else. ValueError: for a model that cannot be traced, or a file that is not ONNX.
        FileNotFoundError, ModuleNotFoundError: for a path, if there is no such file, or no onnx.

    Example:
        >>> import torch
        >>> from granq_plugin import to_static
        >>> from granq_plugin.deploy import fold, prepare
        >>> images = torch.rand(16, 3, 6, 6)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
        >>> static = to_static(prepare(net, images[:1]), [images])
        >>> broken = [rule for rule in check_finn(static) if not rule.passed]
        >>> bool(broken), all(rule.passed for rule in check_finn(fold(static, images[:1])))
        (True, True)
    """
    if isinstance(model, nn.Module):
        from granq_plugin.deploy.finn_torch import read_torch
        ops = read_torch(model)
    elif isinstance(model, (str, os.PathLike)) or hasattr(getattr(model, "model", model), "graph"):
        from granq_plugin.deploy.finn_onnx import read_onnx
        ops = read_onnx(getattr(model, "model", model))
    else:
        raise TypeError(f"check_finn takes a torch model, an ONNX model or the path of one, got {type(model).__name__}")
    for op in ops:
        for source in op.inputs:
            source.users.append(op)
    report = FinnReport()
    for name, rule in RULES.items():
        broken = [RuleResult(name, False, op.name, message) for op, message in rule(ops)]
        report += broken or [RuleResult(name, True)]
    return report


# --- rules: each yields (node, why it fails and what helps)


def _activations(ops: list[Op]) -> list[Op]:
    return [o for o in ops if o.kind == "quant"]


def _layers(ops: list[Op]) -> list[Op]:
    return [o for o in ops if o.kind == "layer"]


def _source(op: Op, passing: tuple[str, ...] = ("shape", )) -> Op:
    while op.kind in passing and op.inputs:
        op = op.inputs[0]
    return op


def _reads_input(op: Op) -> bool:
    return _source(op.inputs[0]).kind == "input"


def _is_integer(op: Op) -> bool:
    op = _source(op, ("shape", "max_pool"))
    return op.kind == "quant" or (op.kind in ("add", "concat") and all(_is_integer(i) for i in op.inputs))


def _static(ops: list[Op]) -> Iterator:
    for op in _activations(ops):
        if op.quant.scale is None or op.quant.zero_point is None:
            yield op, "its scale depends on the input, or is not known yet; freeze the ranges with to_static(), then fold()"


def _unit(ops: list[Op]) -> Iterator:
    for op in _activations(ops):
        scale = op.quant.scale
        if scale is None or _reads_input(op):
            continue
        if scale.size > 1:
            yield op, f"one scale per channel, shape {list(scale.shape)}: no integer accumulation can take it; fold() the model"
        elif scale.item() != 1:
            yield op, f"scale {scale.item():g} is not 1; use a static GranQ quantizer here and fold() the model"


def _zero_points(ops: list[Op]) -> Iterator:
    for op in _activations(ops):
        zero_point = op.quant.zero_point
        if zero_point is not None and (zero_point.size > 1 or zero_point.item() != 0):
            what = f"an array of shape {list(zero_point.shape)}" if zero_point.size > 1 else f"{zero_point.item():g}"
            yield op, f"its zero point is {what}, and must be a scalar 0; quantize behind a ReLU, or with signed=True, and fold()"


def _rounding(ops: list[Op]) -> Iterator:
    for op in _activations(ops):
        if op.quant.rounding.upper() not in ("ROUND", "HALF_EVEN"):
            yield op, f"rounding mode {op.quant.rounding} is accepted silently and computed wrongly; use ROUND"


def _bits_of(quant: Quant) -> str:
    return "an unknown number of bits" if quant.bits is None else f"{quant.bits:g} bits"


def _activation_bits(ops: list[Op]) -> Iterator:
    for op in _activations(ops):
        if op.quant.bits is None or op.quant.bits not in range(2, 9):
            yield op, f"{_bits_of(op.quant)}; activations have 2 to 8"


def _signs(ops: list[Op]) -> Iterator:
    for op in _activations(ops):
        if op.quant.signed:
            continue
        before = op.inputs[0]
        if before.kind != "relu":
            yield op, f"unsigned behind {before.type}: only directly behind a ReLU; use signed=True here"
        elif op.quant.narrow:
            yield op, "unsigned with narrow range; use narrow_range=False"


def _weights_quantized(ops: list[Op]) -> Iterator:
    for op in _layers(ops):
        if op.weight is None:
            yield op, "float weights; quantize them (weight_bit_width)"


def _weights_symmetric(ops: list[Op]) -> Iterator:
    for op in _layers(ops):
        w = op.weight
        if w is None:
            continue
        if not w.signed or w.zero_point is None or np.any(w.zero_point != 0):
            yield op, "asymmetric weights; use GranQWeightPerChannelSymmetric"
        elif not w.narrow:
            yield op, "weights reach -2^(b-1), which leaves a sign behind; use narrow range (GranQWeightPerChannelSymmetric)"


def _weight_scales(ops: list[Op]) -> Iterator:
    for op in _layers(ops):
        scale = op.weight.scale if op.weight is not None else np.ones(())
        if scale is None or any(n != 1 for axis, n in enumerate(scale.shape) if axis != op.channel_axis):
            shape = "computed" if scale is None else f"of shape {list(scale.shape)}"
            yield op, f"weight scale {shape}: a scalar or one per output channel can be moved behind the layer, no other"


def _weight_bits(ops: list[Op]) -> Iterator:
    for op in _layers(ops):
        if op.weight is not None and op.weight.bits not in range(2, 9):
            yield op, f"weights of {_bits_of(op.weight)}; use 2 to 8"


def _integer_inputs(ops: list[Op]) -> Iterator:
    for op in _layers(ops):
        if not _is_integer(op.inputs[0]):
            yield op, (f"reads a float from {_source(op.inputs[0]).name}; convert with deploy.prepare(), which puts a quantizer in "
                       "front of every layer")


def _additions(ops: list[Op]) -> Iterator:
    for op in ops:
        if op.kind != "add":
            continue
        operands = [_source(i, ("shape", "max_pool")) for i in op.inputs]
        floats = [o.name for o in operands if o.kind != "quant"]
        if floats:
            yield op, f"adds a float ({', '.join(floats)}); both branches need one quantizer: convert with deploy.prepare()"
            continue
        first, *others = [o.quant for o in operands]
        for other in others:
            same_scale = first.scale is not None and other.scale is not None and np.array_equal(first.scale, other.scale)
            kinds = [f"{_bits_of(q)} {'signed' if q.signed else 'unsigned'}" for q in (first, other)]
            if not same_scale:
                yield op, "its branches have different scales; share one quantizer: convert with deploy.prepare()"
            elif kinds[0] != kinds[1]:
                yield op, f"its branches have {kinds[0]} and {kinds[1]}; share one quantizer: convert with deploy.prepare()"


def _padding(ops: list[Op]) -> Iterator:
    for op in ops:
        if op.kind == "channel_pad":
            yield op, ("pads channels (option-A shortcut), which has no hardware operator; use 1x1 convolution shortcuts "
                       "(zoo.models.cifar_resnet.convolution_shortcuts)")


def _pooling(ops: list[Op]) -> Iterator:
    for op in ops:
        if op.kind == "average_pool":
            yield op, f"{op.type} is not mapped; use max pooling or a strided convolution, or nn.AdaptiveAvgPool2d(1) at the end"
        elif op.kind == "mean":
            yield op, f"{op.type} is not mapped; use nn.AdaptiveAvgPool2d(1), exported as GlobalAveragePool"
        elif op.kind == "global_pool":
            behind = [_next(u) for u in op.users]
            if not behind or any(b.kind != "quant" for b in behind):
                yield op, "no quantizer behind the global pool; convert with deploy.prepare()"


def _next(op: Op) -> Op:
    while op.kind in ("shape", "norm", "multiply") and len(op.users) == 1:
        op = op.users[0]
    return op


def _inputs(ops: list[Op]) -> Iterator:
    for op in ops:
        if op.kind != "input":
            continue
        readers = [_skip_shapes(u) for u in op.users]
        if not readers or any(r.kind != "quant" for r in readers):
            yield op, "is not quantized; convert with deploy.prepare(), or quantize(input_quant=Int8ActPerTensorFixedPoint)"
        for reader in readers:
            scale = reader.quant.scale if reader.kind == "quant" else None
            if scale is not None and (scale.size > 1 or scale.item() <= 0 or not np.log2(scale.item()).is_integer()):
                what = f"{list(scale.shape)} scales" if scale.size > 1 else f"scale {scale.item():g}"
                yield reader, f"quantizes the input with {what}; use one power of two (Int8ActPerTensorFixedPoint)"


def _skip_shapes(op: Op) -> Op:
    while op.kind == "shape" and len(op.users) == 1:
        op = op.users[0]
    return op


def _rescales(ops: list[Op]) -> Iterator:
    for op in ops:
        if op.kind == "multiply" and op.per_channel:
            yield op, "multiplies per channel: hls4ml takes a rescale as a batch normalization only, as fold() writes it"


def _operators(ops: list[Op]) -> Iterator:
    for op in ops:
        if op.kind == "other":
            hint = "export as QONNX, not QCDQ" if op.type in ("QuantizeLinear", "DequantizeLinear") else (
                "replace it, or leave it outside of the accelerator")
            yield op, f"{op.type} has no hardware operator; {hint}"


def _attributes(ops: list[Op]) -> Iterator:
    for op in ops:
        if op.missing:
            yield op, f"does not state {', '.join(op.missing)}; export it with every attribute"


RULES = {
    "static-activations": _static,
    "unit-activations": _unit,
    "zero-point": _zero_points,
    "rounding": _rounding,
    "activation-bits": _activation_bits,
    "unsigned-behind-relu": _signs,
    "quantized-weights": _weights_quantized,
    "symmetric-weights": _weights_symmetric,
    "weight-scale": _weight_scales,
    "weight-bits": _weight_bits,
    "integer-inputs": _integer_inputs,
    "residual-add": _additions,
    "padding-shortcut": _padding,
    "pooling": _pooling,
    "input-quantizer": _inputs,
    "rescale-as-batch-norm": _rescales,
    "operators": _operators,
    "convolution-attributes": _attributes,
}
