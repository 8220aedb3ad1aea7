"""BatchNorm in evaluation mode, and a residual addition, inside the kernel of the GranQ activation behind them."""

import inspect
import operator
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from brevitas.nn.mixin.base import QuantLayerMixin
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from granq_plugin.core.proxy import FusedActivation, GranQActProxy, is_watched
from granq_plugin.core.unit import UnitActivation
from granq_plugin.kernels import Ahead, is_observed
from granq_plugin.modules import check_module
from granq_plugin.relus import flattened, trace
from granq_plugin.snapshot import Snapshot

__all__ = ["BatchNormAct", "FusedModel", "fuse_batch_norm"]

_LEAVES = (QuantLayerMixin, _BatchNorm)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SUMS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
_SUMS_IN_PLACE = (operator.iadd, "add_")
_TRYING = threading.Lock()


class BatchNormAct(nn.Module):
    """``act(norm(x))``, or ``act(norm(x) + residual)``: the same bits, in one pass over memory where a kernel can.

    Args:
        norm: a BatchNorm layer with running statistics. act: a Brevitas activation layer with a GranQ quantizer, or a folded one.
        add: how the residual is added where that is an operation of its own.
    """

    def __init__(self, norm: nn.Module, act: nn.Module, add: Callable[[Tensor, Tensor], Tensor] = operator.add) -> None:
        super().__init__()
        self.norm, self.act, self.add = norm, act, add
        self.unit = UnitActivation(act) if UnitActivation.suits(act) else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm, act = self.norm, self.act
        if not self._fuses(x, residual):
            y = norm(x)
            return act(y if residual is None else self.add(y, residual))
        if isinstance(norm, _BATCH_NORMS):
            norm._check_input_dim(x)
        ahead = Ahead(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, residual)
        if self.unit is not None:
            return self.unit(x, ahead)
        with act.act_quant.fused_activation_quant_proxy.after(ahead):
            return act(x)

    def _fuses(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether this is what it was when the model was traced, and nobody wants to see what lies between."""
        norm, act = self.norm, self.act
        proxy = act.act_quant
        return (type(x) is Tensor and (residual is None or (type(residual) is Tensor and residual.dtype == x.dtype
                                                            and residual.shape == x.shape))
                and not norm.training and norm.running_mean is not None and norm.running_var is not None
                and proxy.is_quant_enabled and not (proxy.export_mode or act.export_mode) and not act.input_quant.is_quant_enabled
                and (isinstance(proxy, GranQActProxy) and proxy.fused_activation_quant_proxy.fuses() if self.unit is None
                     else self.unit.serves(x))
                and not is_watched(norm, act, act.input_quant, proxy, proxy.fused_activation_quant_proxy))


class FusedModel(nn.Module):
    """A model, or its fused graph where that does the same.

    The graph runs while the model is as it was traced (modules, buffers and parameters, modes), on the required arguments, where
    nobody hooks a module that the graph does not call, and only after it has agreed with the model on the first two samples that
    came. Everything else runs the model.

    Args:
        model: the model. graph: its trace. fused: the same, fused; all on the same modules.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule, fused: fx.GraphModule) -> None:
        super().__init__()
        self.model, self.graph = model, fused
        self.training = model.training
        self._untried = (graph, )  # in a tuple, as below, so that it is no submodule
        self._agrees = False
        self._required = sum(p.default is p.empty for p in inspect.signature(model.forward).parameters.values())
        self._flattened = tuple(flattened(model, _LEAVES))
        self._traced = self._state()

    def forward(self, *args, **kwargs):
        if (torch.compiler.is_compiling() or kwargs or len(args) != self._required or is_watched(*self._flattened)
                or self._state() != self._traced):
            return self.model(*args, **kwargs)
        if self._untried:
            self._try(args)
        return (self.graph if self._agrees else self.model)(*args)

    def _state(self) -> list[tuple]:
        """Of the modules that the trace went through. What the ids belonged to lives on in the graph."""
        return [(m.training, *(tuple(map(id, d.values())) for d in (m._modules, m._parameters, m._buffers)))
                for m in self._flattened]

    def _try(self, args: tuple) -> None:
        """Compare trace and model, unless somebody looks, who would see calls that are none."""
        if (is_watched(*self.model.modules()) or is_observed()
                or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())):
            return
        with _TRYING:
            if self._untried:
                self._agrees = _same_outputs(self.model, self._untried[0], args)
                self._untried = ()


def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """A model that computes the same, bit for bit, in fewer passes over memory: to be run, not to be saved.

    A BatchNorm in evaluation mode whose output only a GranQ activation, or one of a folded network, reads is computed inside of the
    activation's kernel, and so is a residual addition between them, with gradients and without. The gradient of a tensor with three
    readers or more may differ in the last places, as its summands come in another order; on a GPU BatchNorm's last places may.

    Args:
        model: float or quantized, in the mode in which it will run; it is left as it is and shares its modules with the result.

    Returns:
        A :class:`FusedModel`; or the model itself where there is nothing to fuse, where it cannot be traced, or where tracing would
        lose something: values computed anew at each call, attributes that the forward sets, gradients or autocast that it
        switches. What the forward decides by attributes of its own, other than modes, is decided once.

    Example:
        >>> import brevitas.nn as qnn
        >>> from granq_plugin import GranQActPerChannel
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), qnn.QuantReLU(GranQActPerChannel, bit_width=4)).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(fuse_batch_norm(net)(x), net(x))
        True
    """
    check_module(model)
    if is_watched(*flattened(model, _LEAVES)) or not any(map(_is_act, model.modules())):  # hooks would run as it is traced
        return model
    graph = _traced(model)
    if graph is None:
        return model
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    fused = fx.GraphModule(graph, nodes)
    acts = [n for n in fused.graph.nodes if n.op == "call_module" and _is_act(fused.get_submodule(n.target))]
    if not sum(_fuse(fused, node) for node in acts):
        return model
    fused.graph.lint()
    fused.recompile()
    return FusedModel(model, graph, fused)


def _traced(model: nn.Module) -> fx.GraphModule | None:
    """The model's trace, where it loses nothing; the model stays as it is."""
    try:
        with _random_numbers_kept() as drawn, torch.enable_grad():
            graph = trace(model, _LEAVES, strict=True)
            return None if drawn() else graph
    except Exception:  # tracing runs the user's forward: anything may come out of it
        return None


def _same_outputs(model: nn.Module, graph: nn.Module, args: tuple) -> bool:
    """Of the first two samples, to the bit. Both are left as they are."""
    def few(a: Any) -> Any:
        return (a[:2] if a.dim() else a).clone() if isinstance(a, Tensor) else a

    snapshot, outputs = Snapshot(model), []
    try:
        for module in (graph, model):
            with torch.no_grad(), _random_numbers_kept():
                outputs.append(module(*tree_map(few, args)))
            snapshot.restore()
        torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)
        return True
    except Exception:  # of either, for the model to raise itself if it is its own
        return False
    finally:
        snapshot.restore()


@contextmanager
def _random_numbers_kept() -> Iterator[Callable[[], bool]]:
    """Who draws random numbers afterwards, on the CPU, draws those that would have come. Yields whether any were drawn."""
    def states() -> tuple:
        _, keys, *more = numpys = np.random.get_state()  # noqa: NPY002 (a user's forward may draw from it)
        return (random.getstate(), keys.tobytes(), more, torch.get_rng_state().numpy().tobytes()), numpys

    before, of_numpy = states()
    try:
        with torch.random.fork_rng(devices=[]):
            yield lambda: states()[0] != before
    finally:
        random.setstate(before[0])
        np.random.set_state(of_numpy)  # noqa: NPY002


def _is_act(module: nn.Module) -> bool:
    return (isinstance(module, QuantNonLinearActLayer) and type(module).forward is QuantNonLinearActLayer.forward
            and ((isinstance(module.act_quant, GranQActProxy)
                  and type(module.act_quant.fused_activation_quant_proxy) is FusedActivation) or UnitActivation.suits(module)))


def _fuse(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Call a :class:`BatchNormAct` instead of an activation and what is ahead of it, where its inputs are last read, if it may
    be."""
    if len(node.args) != 1 or node.kwargs:
        return False
    norm = last = node.args[0]
    residual, add = (), operator.add
    if _is_sum(last):
        at = next((i for i in (0, 1) if _is_norm(last.args[i], graph)), None)
        if at is None or len(last.users) > 1 or (at == 1 and last.target in _SUMS_IN_PLACE):
            return False
        add = operator.iadd if last.target in _SUMS_IN_PLACE else add
        norm, residual = last.args[at], (last.args[1 - at], )
        if norm in residual or not all(_only_reads(n, graph) for n in _between(norm, last)):
            return False
    if not _is_norm(norm, graph) or len(norm.users) > 1:
        return False
    name = f"{norm.target}_{node.target}".replace(".", "_")
    while hasattr(graph, name):
        name += "_"
    graph.add_submodule(name, BatchNormAct(graph.get_submodule(norm.target), graph.get_submodule(node.target), add))
    with graph.graph.inserting_before(last):
        fused = graph.graph.call_module(name, (norm.args[0], *residual))
    node.replace_all_uses_with(fused)
    for replaced in dict.fromkeys((node, last, norm)):
        graph.graph.erase_node(replaced)
    return True


def _is_sum(node) -> bool:
    """Of two nodes, and nothing else."""
    return (isinstance(node, fx.Node) and node.target in _SUMS.get(node.op, ()) and len(node.args) == 2 and not node.kwargs
            and all(isinstance(a, fx.Node) for a in node.args))


def _is_norm(node, graph: fx.GraphModule) -> bool:
    return (isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
            and _evaluates_as_batch_norm(graph.get_submodule(node.target)))


def _evaluates_as_batch_norm(module: nn.Module) -> bool:
    """BatchNorm itself, also with parametrized weights, and the channel-wise factors of folded networks, which say so."""
    kind = type(module).__base__ if is_parametrized(module) else type(module)
    return kind in _BATCH_NORMS or vars(kind).get("evaluates_as_batch_norm", False)


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes = list(first.graph.nodes)
    return nodes[nodes.index(first) + 1:nodes.index(last)]


def _only_reads(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a node certainly writes to no tensor that others hold."""
    if node.op == "call_module":
        module = graph.get_submodule(node.target)
        return (type(module).__module__.startswith(("torch.nn.", "brevitas.nn.", __package__))
                and not getattr(module, "inplace", False))
    if node.op == "call_method":
        return not node.target.endswith("_")
    if node.op == "call_function" and not node.kwargs.keys() & {"inplace", "out"}:
        name = getattr(node.target, "__name__", "_")
        if getattr(operator, name, None) is node.target:
            return not name.startswith("i") and name not in ("setitem", "delitem")
        if getattr(F, name, None) is node.target and any(a is True for a in node.args):  # which may say inplace
            return False
        return not name.endswith("_") and any(getattr(home, name, None) is node.target for home in (torch, F))
    return node.op == "get_attr"
