"""BatchNorm in evaluation mode, and a residual addition, inside the kernel of the GranQ activation behind them."""

import operator
from collections.abc import Callable

import torch
from brevitas.nn.mixin.base import QuantLayerMixin
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from granq_plugin.core.proxy import GranQActProxy, has_hooks
from granq_plugin.kernels import Ahead
from granq_plugin.relus import trace

__all__ = ["BatchNormAct", "fuse_batch_norm"]

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


def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """A model that computes the same, bit for bit, in fewer passes over memory: to be run, not to be saved.

    A BatchNorm whose output only a GranQ activation reads is computed inside of the activation's kernel, and so is a residual
    addition between them. That holds in evaluation mode, with gradients and without; in training mode BatchNorm is what it was.

    Args:
        model: float or quantized, in the mode in which it will run; it is left as it is and shares its modules with the result.

    Returns:
        A ``torch.fx.GraphModule`` as :func:`granq_plugin.quantize` describes it; or the model itself where there is nothing to
        fuse, where it cannot be traced, or where tracing would lose hooks or make constants of what is computed anew.

    Example:
        >>> import brevitas.nn as qnn
        >>> from granq_plugin import GranQActPerChannel
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), qnn.QuantReLU(GranQActPerChannel, bit_width=4)).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(fuse_batch_norm(net)(x), net(x))
        True
    """
    if any(has_hooks(m) for m in model.modules() if not isinstance(m, QuantLayerMixin) and any(True for _ in m.children())):
        return model
    try:
        graph_model = trace(model, (QuantLayerMixin, _BatchNorm))
    except Exception:  # tracing runs the user's forward: anything may come out of it
        return model
    if any(n.op == "get_attr" and n.target.startswith("_tensor_constant") for n in graph_model.graph.nodes):
        return model
    nodes = [n for n in graph_model.graph.nodes if n.op == "call_module" and _is_act(graph_model.get_submodule(n.target))]
    count = sum(_fuse(graph_model, node) for node in nodes)
    if not count:
        return model
    graph_model.graph.lint()
    graph_model.recompile()
    return graph_model


def _is_act(module: nn.Module) -> bool:
    return isinstance(module, QuantNonLinearActLayer) and isinstance(module.act_quant, GranQActProxy)


def _fuse(graph_model: fx.GraphModule, node: fx.Node) -> bool:
    """Replace the call of an activation, and what is ahead of it, by one of a :class:`BatchNormAct`, if it may be."""
    if len(node.args) != 1 or node.kwargs:
        return False
    before, residual, add = node.args[0], (), operator.add
    if _is_sum(before):
        at = next((i for i in (0, 1) if _is_norm(before.args[i], graph_model)), None)
        if at is None or len(before.users) > 1 or (at == 1 and before.target in _SUMS_IN_PLACE):
            return False
        add = operator.iadd if before.target in _SUMS_IN_PLACE else add
        before, residual = before.args[at], (before.args[1 - at], )
    if not _is_norm(before, graph_model) or len(before.users) > 1:
        return False
    name = f"{before.target}_{node.target}".replace(".", "_")
    while hasattr(graph_model, name):
        name += "_"
    graph_model.add_submodule(name, BatchNormAct(
        graph_model.get_submodule(before.target), graph_model.get_submodule(node.target), add))
    with graph_model.graph.inserting_before(node):
        fused = graph_model.graph.call_module(name, (before.args[0], *residual))
    node.replace_all_uses_with(fused)
    for replaced in (node, *(n for n in node.all_input_nodes if n is not before), before):
        graph_model.graph.erase_node(replaced)
    return True


def _is_sum(node) -> bool:
    """Of two nodes, and nothing else."""
    return (isinstance(node, fx.Node) and node.target in (*_SUMS, *_SUMS_IN_PLACE) and len(node.args) == 2 and not node.kwargs
            and all(isinstance(a, fx.Node) for a in node.args))


def _is_norm(node, graph_model: fx.GraphModule) -> bool:
    return (isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
            and type(graph_model.get_submodule(node.target)) in _BATCH_NORMS)
