"""Reading a torch model for :func:`granq_plugin.deploy.check_finn`."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.proxy.runtime_quant import DynamicActQuantProxyFromInjector
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from granq_plugin.deploy.finn import Op, Quant
from granq_plugin.deploy.graph import BY_A_NUMBER, Role, TracedModel, trace_quantized
from granq_plugin.relus import relu_class

__all__ = ["read_torch"]

_MAX_POOLS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d}
_GLOBAL_POOLS = {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d}
_PASSING = {torch.flatten, torch.reshape, torch.squeeze, "flatten", "reshape", "view", "squeeze", "contiguous", "clone", "detach"}
_SIZES = {getattr, "size", "dim", "numel"}


def read_torch(model: nn.Module) -> list[Op]:
    """The network's nodes in order of execution. Raises a ValueError if it cannot be traced."""
    traced, ops, read = trace_quantized(model), {}, []
    for node in traced.nodes:
        inputs = [ops[n] for n in node.all_input_nodes if n in ops]
        if node.target in _SIZES or (node.op == "call_function" and node.all_input_nodes and not inputs):
            continue  # arithmetic on sizes
        if node.op == "placeholder" and not node.users:
            continue
        for op in _read(traced, node, inputs):
            read.append(op)
            ops[node] = op
    return read


def _read(traced: TracedModel, node: fx.Node, inputs: list[Op]) -> list[Op]:
    """One Op, or several where a Brevitas layer holds its quantizers."""
    module, role = traced.called(node), traced.role(node)
    name = node.target if node.op == "call_module" else node.name
    kind_name = type(module).__name__.removeprefix("Parametrized") if module is not None else getattr(
        node.target, "__name__", str(node.target))
    if module is None or role not in (Role.QUANTIZER, Role.LAYER) or isinstance(module, _BatchNorm):
        return [Op(name, _kind(traced, node, role), kind_name, inputs)]
    read = []

    def append(kind: str, suffix: str = "", **facts) -> None:
        read.append(Op(name + suffix, kind, kind_name, [read[-1]] if read else inputs, **facts))

    if getattr(module, "input_quant", None) is not None and module.input_quant.is_quant_enabled:
        append("quant", ".input_quant", quant=_activation(module.input_quant))
    if isinstance(module, QuantNonLinearActLayer):
        fused = module.act_quant.fused_activation_quant_proxy
        if fused is not None and isinstance(fused.activation_impl, nn.ReLU):
            append("relu", ".relu" if module.act_quant.is_quant_enabled else "")
        elif fused is not None and isinstance(fused.activation_impl, (nn.Sigmoid, nn.Tanh)):
            append("other", ".activation")
        if module.act_quant.is_quant_enabled:
            append("quant", quant=_activation(module.act_quant))
        return read or [Op(name, "shape", kind_name, inputs)]
    append("layer", weight=_weight(module), channel_axis=getattr(module, "output_channel_dim", 0))
    if getattr(module, "output_quant", None) is not None and module.output_quant.is_quant_enabled:
        append("quant", ".output_quant", quant=_activation(module.output_quant))
    return read


def _kind(traced: TracedModel, node: fx.Node, role: Role) -> str:
    module = traced.called(node)
    fixed = {Role.INPUT: "input", Role.OUTPUT: "output", Role.SUM: "add", Role.CONCAT: "concat"}
    if role in fixed:
        return fixed[role]
    relu = relu_class(node, traced.module)
    if relu is not None:
        return "relu" if relu is nn.ReLU else "other"
    if isinstance(module, _BatchNorm):
        return "norm"
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) or node.target in _MAX_POOLS:
        return "max_pool"
    if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)) or node.target in _GLOBAL_POOLS:
        size = module.output_size if module is not None else node.kwargs.get("output_size", (*node.args, None)[1])
        return "global_pool" if size in (1, (1, ), [1], (1, 1), [1, 1]) else "average_pool"
    if "avg_pool" in getattr(node.target, "__name__", "") or (module is not None and "AvgPool" in type(module).__name__):
        return "average_pool"
    if role is Role.REDUCTION:
        return "mean"
    if node.target is F.pad:
        pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
        return "channel_pad" if len(pad) > 4 else "other"
    if node.target in BY_A_NUMBER:
        return "multiply" if role is Role.ELEMENTWISE else "other"
    if node.target in _PASSING or isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)):
        return "shape"
    return "other"


def _activation(proxy) -> Quant:
    scale = zero_point = None
    if not isinstance(proxy, DynamicActQuantProxyFromInjector):
        with contextlib.suppress(RuntimeError):  # no ranges yet
            scale, zero_point = _array(proxy.scale()), _array(proxy.zero_point())
    return Quant(_bits(proxy), bool(proxy.is_signed), bool(proxy.is_narrow_range), proxy.rounding_mode or "", scale, zero_point)


def _weight(layer: nn.Module) -> Quant | None:
    proxy = getattr(layer, "weight_quant", None)
    if proxy is None or not proxy.is_quant_enabled:
        return None
    return Quant(_bits(proxy), bool(proxy.is_signed), bool(proxy.is_narrow_range), proxy.rounding_mode or "", _array(proxy.scale()),
                 _array(proxy.zero_point()))


def _bits(proxy) -> float | None:
    try:
        return float(proxy.bit_width())
    except RuntimeError:
        return None


def _array(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().cpu().numpy()
