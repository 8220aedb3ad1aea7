"""Which per-channel scale every tensor of a folded network is held in.

A folded tensor holds ``value / unit`` with one unit per channel. A quantizer's unit is its scale; inputs and outputs have unit 1.
Convolutions, linear layers and batch normalizations can take any unit and give any other, since their parameters absorb both.
So units only have to agree between two such layers, and there are three ways to make them: the layer in front takes the unit that
is wanted behind it (through additions, concatenations and pools), the layer behind takes the unit that it is given, and where
neither stands in between, as on the identity branch of a residual block, a rescale is put in.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from granq_plugin.deploy.graph import Role, TracedModel

__all__ = ["Rescale", "Units", "along", "assign_units"]


class Rescale(NamedTuple):
    """``reader`` must see the output of ``producer`` times ``factors``, ``[C]``."""
    producer: fx.Node
    reader: fx.Node
    factors: Tensor


class Units(NamedTuple):
    """Attributes: unit: node -> float64 tensor of the shape of the node's output. rescales: where two units meet."""
    unit: dict[fx.Node, Tensor]
    rescales: list[Rescale]


def along(unit: Tensor, axis: int) -> Tensor | None:
    """The unit of each channel on ``axis``, ``[C]``, or None if it also varies along another axis than the batch's."""
    rows = unit.movedim(axis, 0).flatten(1)
    return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


def assign_units(traced: TracedModel, scales: dict[fx.Node, Tensor], real_inputs: set[fx.Node]) -> Units:
    """Choose the unit of every tensor.

    Args:
        traced: the graph, run on an example.
        scales: quantizer node -> its static scale, broadcastable to its output. Other quantizers stay as they are, in unit 1.
        real_inputs: layers whose own input quantizer needs unit 1.

    Raises:
        ValueError: names the node that a scale reaches and that cannot take it.
    """
    return _Assignment(traced, scales, real_inputs).solve()


class _Assignment:

    def __init__(self, traced: TracedModel, scales: dict[fx.Node, Tensor], real_inputs: set[fx.Node]) -> None:
        self.traced, self.real_inputs = traced, real_inputs
        self.nodes = [n for n in traced.nodes if n not in traced.values]
        self.roles = {n: traced.role(n) for n in self.nodes}
        self.scales = {n: s.detach().double().expand(traced.shapes[n]) for n, s in scales.items()}
        self.forced: dict[fx.Node, Tensor | None] = {}
        self.wanted: dict[fx.Node, Tensor | None] = {}
        self.floats: set[fx.Node] = set()
        self.unit: dict[fx.Node, Tensor] = {}

    def solve(self) -> Units:
        for node in self.nodes:
            self.forced[node] = self._forced(node)
        for node in reversed(self.nodes):
            readers = [r for r in node.users if r in self.roles]
            if any(self._reads_floats(r) for r in readers):
                self.floats.add(node)
                self.wanted[node] = self._ones(node)
            else:
                wants = (self._want_of(r, node) for r in readers)
                self.wanted[node] = next((w for w in wants if w is not None), None)
        rescales = []
        for node in self.nodes:
            rescales += self._rescales_before(node)
            if self.roles[node] is not Role.OUTPUT:
                self.unit[node] = self._final(node)
        return Units(self.unit, rescales)

    # --- the three passes

    def _forced(self, node: fx.Node) -> Tensor | None:
        """The unit that ``node`` has whatever stands behind it; None if a layer in front of it can still choose."""
        role = self.roles[node]
        if role is Role.QUANTIZER:
            return self.scales.get(node, self._ones(node))
        if role in (Role.INPUT, Role.OPAQUE):
            return self._ones(node)
        if role in (Role.LAYER, Role.OUTPUT):
            return None
        inputs = [self.forced[n] for n in self._inputs(node)]
        if any(u is None for u in inputs):
            return None
        if role is Role.SUM:
            return inputs[0] if all(torch.equal(inputs[0], u) for u in inputs[1:]) else None
        return self._carry(node, inputs)

    def _want_of(self, reader: fx.Node, node: fx.Node) -> Tensor | None:
        """The unit in which ``reader`` would like its input ``node``."""
        role = self.roles[reader]
        if role is Role.LAYER:
            return self._ones(node) if reader in self.real_inputs else None
        if role is Role.QUANTIZER:
            return self.scales.get(reader, self._ones(reader))
        if role in (Role.OUTPUT, Role.OPAQUE):
            return self._ones(node)
        if role is Role.SUM:
            return self._sum_target(reader)
        want = self.wanted[reader]
        if want is None or role is Role.ELEMENTWISE:
            return want
        if role is Role.SPATIAL:
            per_channel = along(want, 1)
            fits = per_channel is not None and per_channel.numel() == self.traced.shapes[node][1]
            return self._expand(per_channel, node) if fits else None
        return self._concat_slices(reader, want)[node] if self._splits_wants(reader) else None

    def _reads_floats(self, reader: fx.Node) -> bool:
        """Whether a convolution or linear layer reads this tensor without a quantizer in between, if it has no forced unit.

        Then it stays in unit 1: a quantizer's scale that is put on it says nothing about its values (a dead channel's least of
        all), and would distort the weights that take the scale back out.
        """
        if self.roles[reader] is Role.LAYER:
            return not isinstance(self.traced.called(reader), _BatchNorm)
        return reader in self.floats and (self.roles[reader] in (Role.ELEMENTWISE, Role.SPATIAL) or self._splits_wants(reader))

    def _final(self, node: fx.Node) -> Tensor:
        if self.forced[node] is not None:
            return self.forced[node]
        role = self.roles[node]
        if role is Role.LAYER:
            return self._ones(node) if self.wanted[node] is None else self.wanted[node]
        if role is Role.SUM:
            return self._sum_target(node)
        if self._splits_wants(node):
            return self.wanted[node]
        return self._carry(node, [self.unit[n] for n in self._inputs(node)])

    # --- units of single nodes

    def _sum_target(self, node: fx.Node) -> Tensor:
        """The unit that both operands of an addition must have."""
        chosen = (u for u in (self.forced[node], self.wanted.get(node)) if u is not None)
        return next(chosen, self._ones(node))

    def _carry(self, node: fx.Node, inputs: list[Tensor]):
        """The unit behind ``node`` of the units in front of it."""
        role, unit = self.roles[node], inputs[0]
        if role is Role.ELEMENTWISE:
            return unit
        if role is Role.SPATIAL:
            return self._expand(self._padded(node, self._channels_of(node, unit)), node)
        if role is Role.REDUCTION:
            return self._reduced(node, unit)
        values = dict(zip(self._inputs(node), inputs))  # rearrangements and concatenation act on units as on values
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values.get(n, self.traced.values.get(n)))
        if node.op == "call_method":  # units are expanded, which view() would refuse
            return getattr(args[0], "reshape" if node.target == "view" else node.target)(*args[1:], **kwargs)
        return (self.traced.called(node) or node.target)(*args, **kwargs)

    def _padded(self, node: fx.Node, per_channel: Tensor) -> Tensor:
        """Channels that padding appends hold zeros, which have any unit: 1."""
        if node.target is not F.pad:
            return per_channel
        pad = fx.node.map_arg(node.args[1] if len(node.args) > 1 else node.kwargs["pad"], self.traced.values.get)
        channel_pad = 2 * (len(self.traced.shapes[node]) - 2)
        if any(pad[channel_pad + 2:]):
            self._refuse(node, "it pads the batch")
        return F.pad(per_channel, tuple(pad[channel_pad:channel_pad + 2]), value=1.0) if len(pad) > channel_pad else per_channel

    def _reduced(self, node: fx.Node, unit: Tensor) -> Tensor:
        args = fx.node.map_arg(node.args[1:], self.traced.values.get)
        dim = node.kwargs.get("dim", args[0] if args else None)
        keepdim = node.kwargs.get("keepdim", args[1] if len(args) > 1 else False)
        dims = tuple(range(unit.dim())) if dim is None else dim
        low, high = unit.amin(dims, keepdim), unit.amax(dims, keepdim)
        if not torch.equal(low, high):
            self._refuse(node, "it adds up channels of different scales")
        return high

    def _channels_of(self, node: fx.Node, unit: Tensor) -> Tensor:
        per_channel = along(unit, 1) if unit.dim() > 1 else None
        if per_channel is None:
            self._refuse(node, "its input's scale does not stand on axis 1")
        return per_channel

    def _splits_wants(self, node: fx.Node) -> bool:
        """Whether ``node`` is a concatenation that hands a wanted unit on: each operand occurs once, and is free to take it."""
        if self.roles[node] is not Role.CONCAT or self.wanted.get(node) is None:
            return False
        operands = node.args[0] if node.args else node.kwargs["tensors"]
        return len(set(operands)) == len(operands) and all(self.forced[n] is None for n in operands)

    def _concat_slices(self, node: fx.Node, want: Tensor) -> dict[fx.Node, Tensor]:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        inputs = node.args[0] if node.args else node.kwargs["tensors"]
        return dict(zip(inputs, want.split([self.traced.shapes[n][dim] for n in inputs], dim)))

    def _rescales_before(self, node: fx.Node) -> list[Rescale]:
        """What must stand between ``node`` and its inputs, whose units are final."""
        role, demands = self.roles[node], {}
        if role in (Role.SUM, Role.QUANTIZER, Role.OUTPUT, Role.OPAQUE) or node in self.real_inputs:
            demands = {n: self._want_of(node, n) for n in self._inputs(node)}
        elif self._splits_wants(node):
            demands = self._concat_slices(node, self.wanted[node])
        rescales = []
        for producer, demand in demands.items():
            if isinstance(demand, tuple):  # the parts of a chunk(), all read at once
                same = all(torch.equal(u, d) for u, d in zip(self.unit[producer], demand))
            else:
                same = torch.equal(self.unit[producer], demand)
            if same:
                continue
            if role is Role.OPAQUE and self.forced[producer] is not None:
                self._refuse(node, f"it cannot take the scale of {self._sources(producer)}; only layers, additions, "
                                   "concatenations, pooling, reshaping and f(s x) = s f(x) can stand behind a folded quantizer")
            factors = along(self.unit[producer] / demand, 1) if demand.dim() > 1 else None
            if factors is None:
                self._refuse(node, f"its operands have different scales (of {self._sources(producer)}), and these are not one for "
                                   "each channel on axis 1")
            rescales.append(Rescale(producer, node, factors))
        return rescales

    # --- small things

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.roles]

    def _ones(self, node: fx.Node):
        shape = self.traced.shapes[node]
        if isinstance(shape, torch.Size):
            return torch.ones((), dtype=torch.float64).expand(shape)
        return tuple(torch.ones((), dtype=torch.float64).expand(s) for s in shape)

    def _expand(self, per_channel: Tensor, node: fx.Node) -> Tensor:
        shape = self.traced.shapes[node]
        return per_channel.view(-1, *[1] * (len(shape) - 2)).expand(shape)

    def _sources(self, node: fx.Node) -> str:
        """The quantizers whose scales ``node`` carries."""
        seen, names, stack = set(), [], [node]
        while stack:
            n = stack.pop()
            if n in self.scales:
                names.append(self.traced.describe(n))
            elif n not in seen and self.roles[n] is not Role.LAYER:
                stack += self._inputs(n)
            seen.add(n)
        return ", ".join(dict.fromkeys(names)) or "the model's input"

    def _refuse(self, node: fx.Node, reason: str) -> None:
        raise ValueError(f"cannot fold at {self.traced.describe(node)}: {reason}")
