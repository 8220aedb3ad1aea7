"""BatchNorm in evaluation mode, and a residual addition, inside the kernel of the GranQ activation behind them."""

import inspect
import operator
from collections.abc import Callable

import torch
from brevitas.nn.mixin.base import QuantLayerMixin
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from granq_plugin.core.proxy import GranQActProxy, has_hooks
from granq_plugin.kernels import Ahead
from granq_plugin.relus import flattened, trace

__all__ = ["BatchNormAct", "FusedModel", "fuse_batch_norm"]

_LEAVES = (QuantLayerMixin, _BatchNorm)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SUMS = (operator.add, torch.add, "add")
_SUMS_IN_PLACE = (operator.iadd, "add_")


class BatchNormAct(nn.Module):
    """``act(norm(x))``, or ``act(norm(x) + residual)``: the same bits, in one pass over memory where a kernel can.

    Args:
        norm: a BatchNorm layer with running statistics. act: a Brevitas activation layer with a GranQ quantizer.
        add: how the residual is added where that is an operation of its own.
    """

    def __init__(self, norm: nn.Module, act: nn.Module, add: Callable[[Tensor, Tensor], Tensor] = operator.add) -> None:
        super().__init__()
        self.norm, self.act, self.add = norm, act, add

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm, act = self.norm, self.act
        if not self._fuses(x, residual):
            y = norm(x)
            return act(y if residual is None else self.add(y, residual))
        fused = act.act_quant.fused_activation_quant_proxy
        fused.ahead = Ahead(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, residual)
        try:
            return act(x)
        finally:
            fused.ahead = None

    def _fuses(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether this is what it was when the model was traced, and no hook wants to see what lies between."""
        norm, act = self.norm, self.act
        proxy = act.act_quant
        return (type(x) is Tensor and (residual is None or (type(residual) is Tensor and residual.dtype == x.dtype
                                                            and residual.shape == x.shape))
                and not norm.training and norm.running_mean is not None and norm.running_var is not None
                and isinstance(proxy, GranQActProxy) and proxy.is_quant_enabled and not (proxy.export_mode or act.export_mode)
                and not act.input_quant.is_quant_enabled and proxy.fused_activation_quant_proxy.fuses()
                and not any(map(has_hooks, (norm, act, proxy, proxy.fused_activation_quant_proxy))))


class FusedModel(nn.Module):
    """A model, or its fused graph where that does the same: in the mode in which it was traced, on the required arguments, and
    while nobody hooks a module that the graph does not call.

    Args:
        model: the model. graph: its fused trace, on the same modules.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        super().__init__()
        self.model, self.graph = model, graph
        self._mode = self.training = model.training
        self._required = sum(p.default is p.empty for p in inspect.signature(model.forward).parameters.values())
        self._flattened = tuple(flattened(model, _LEAVES))  # a tuple, so that they are not submodules again

    def forward(self, *args, **kwargs):
        if self.model.training != self._mode or kwargs or len(args) != self._required or any(map(has_hooks, self._flattened)):
            return self.model(*args, **kwargs)
        return self.graph(*args)


def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """A model that computes the same, bit for bit, in fewer passes over memory: to be run, not to be saved.

    A BatchNorm in evaluation mode whose output only a GranQ activation reads is computed inside of the activation's kernel, and so
    is a residual addition between them, with gradients and without. On a GPU BatchNorm's last places may differ.

    Args:
        model: float or quantized, in the mode in which it will run; it is left as it is and shares its modules with the result.

    Returns:
        A :class:`FusedModel`; or the model itself where there is nothing to fuse, where it cannot be traced, or where tracing would
        make constants of what is computed anew.

    Example:
        >>> import brevitas.nn as qnn
        >>> from granq_plugin import GranQActPerChannel
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), qnn.QuantReLU(GranQActPerChannel, bit_width=4)).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(fuse_batch_norm(net)(x), net(x))
        True
    """
    if not any(map(_is_act, model.modules())) or any(map(has_hooks, flattened(model, _LEAVES))):  # hooks would run as it is traced
        return model
    try:
        graph = trace(model, _LEAVES)
    except Exception:  # tracing runs the user's forward: anything may come out of it
        return model
    if any(n.op == "get_attr" and n.target.startswith("_tensor_constant") for n in graph.graph.nodes):
        return model
    nodes = [n for n in graph.graph.nodes if n.op == "call_module" and _is_act(graph.get_submodule(n.target))]
    if not sum(_fuse(graph, node) for node in nodes):
        return model
    graph.graph.lint()
    graph.recompile()
    return FusedModel(model, graph)


def _is_act(module: nn.Module) -> bool:
    return isinstance(module, QuantNonLinearActLayer) and isinstance(module.act_quant, GranQActProxy)


def _fuse(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Replace the call of an activation, and what is ahead of it, by one of a :class:`BatchNormAct`, if it may be."""
    if len(node.args) != 1 or node.kwargs:
        return False
    before, residual, add = node.args[0], (), operator.add
    if _is_sum(before):
        at = next((i for i in (0, 1) if _is_norm(before.args[i], graph)), None)
        if at is None or len(before.users) > 1 or (at == 1 and before.target in _SUMS_IN_PLACE):
            return False
        add = operator.iadd if before.target in _SUMS_IN_PLACE else add
        before, residual = before.args[at], (before.args[1 - at], )
    if not _is_norm(before, graph) or len(before.users) > 1:
        return False
    name = f"{before.target}_{node.target}".replace(".", "_")
    while hasattr(graph, name):
        name += "_"
    graph.add_submodule(name, BatchNormAct(
        graph.get_submodule(before.target), graph.get_submodule(node.target), add))
    with graph.graph.inserting_before(node):
        fused = graph.graph.call_module(name, (before.args[0], *residual))
    node.replace_all_uses_with(fused)
    for replaced in (node, *(n for n in node.all_input_nodes if n is not before), before):
        graph.graph.erase_node(replaced)
    return True


def _is_sum(node) -> bool:
    """Of two nodes, and nothing else."""
    return (isinstance(node, fx.Node) and node.target in (*_SUMS, *_SUMS_IN_PLACE) and len(node.args) == 2 and not node.kwargs
            and all(isinstance(a, fx.Node) for a in node.args))


def _is_norm(node, graph: fx.GraphModule) -> bool:
    return (isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
            and type(graph.get_submodule(node.target)) in _BATCH_NORMS)
