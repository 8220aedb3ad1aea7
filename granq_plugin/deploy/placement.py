"""Quantizers where an integer accelerator needs them: :func:`prepare`."""

import itertools
import warnings

import brevitas.nn as qnn
import torch
import torch.nn.functional as F
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.quant import Int8ActPerTensorFixedPoint
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from granq_plugin.convert import quantize
from granq_plugin.deploy.graph import BY_A_NUMBER, Role, TracedModel, trace_quantized
from granq_plugin.functional import check_bit_width
from granq_plugin.modules import check_module, copy_model
from granq_plugin.quantizers import GranQActPerChannelStatic, GranQWeightPerChannelSymmetric
from granq_plugin.relus import relu_class

__all__ = ["prepare"]

_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_MAX_POOL_FUNCTIONS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d}

SIGNED_STATIC = GranQActPerChannelStatic.let(signed=True, narrow_range=True, range_mode="minmax")
"""For both branches of an addition, called one after the other: the union of their ranges."""


def prepare(
        model: nn.Module,
        example_input,
        weight_bit_width: int = 4,
        act_bit_width: int = 4,
        *,
        residual_bit_width: int = 8,
        pool_bit_width: int = 8,
        input_bit_width: int = 8,
        weight_quant=GranQWeightPerChannelSymmetric,
        inplace: bool = False,
        **options) -> fx.GraphModule:
    """Quantize a float model for an integer accelerator: :func:`granq_plugin.quantize`, and no float between two layers.

    The paper leaves the image, the branches of additions, and pooled features in float. Here, from the start of training,

    * the image is quantized per tensor with a power-of-two scale, signed;
    * the branches of an addition share one static per-channel quantizer, signed, so that their integers have one unit;
    * what is pooled globally is quantized, and pools of the whole image are written as ``nn.AdaptiveAvgPool2d(1)``;
    * so is whatever else a layer or concatenation would read in float, such as linear bottlenecks (``residual_bit_width``, signed).

    Then calibrate with ``to_static``, which finds the ranges of these too (or train: in training mode they are collected), and
    :func:`fold`.

    Args:
        model: float model in evaluation mode, that torch.fx can trace. example_input: as for :func:`fold`.
        weight_bit_width, act_bit_width, weight_quant, options: as for :func:`granq_plugin.quantize`.
        residual_bit_width, pool_bit_width, input_bit_width: 2 to 8 are what FINN takes; they are signed.
        inplace: change the modules of ``model`` itself; otherwise a deep copy's.

    Returns:
        A GraphModule; the new quantizers are its modules ``input_quant_0``, ``residual_quant_0``, ``residual_quant_1``...,
        ``layer_input_quant_0``..., ``pool_quant_0``. It runs in evaluation mode once it is calibrated.

    Raises:
        TypeError, ValueError: see :func:`granq_plugin.quantize`; if the model cannot be traced.

    Example:
        >>> images = torch.rand(16, 3, 6, 6)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
        >>> prepared = prepare(net, images[:1], weight_bit_width=4, act_bit_width=4)
        >>> [name for name, _ in prepared.named_children()]
        ['0', '1', '2', '3', '4', 'input_quant_0']
    """
    check_module(model)
    if any(isinstance(m, QuantProxyFromInjector) for m in model.modules()):
        raise ValueError("model is already quantized: it contains Brevitas quantizers; prepare() starts from the float model")
    bits = dict(residual_bit_width=residual_bit_width, pool_bit_width=pool_bit_width, input_bit_width=input_bit_width)
    for name, bit_width in bits.items():
        if check_bit_width(bit_width) < 2:
            raise ValueError(f"{name} must be at least 2 (it is signed), got {bit_width}")
    if "input_quant" in options:
        raise TypeError("prepare() quantizes the input itself; it takes input_bit_width, not input_quant")
    traced = trace_quantized(model if inplace else copy_model(model))
    traced.run(example_input)
    bit_widths = _Placement(traced, residual_bit_width, pool_bit_width).place()
    with warnings.catch_warnings():  # here all of them have a quantizer before the next layer
        warnings.filterwarnings("ignore", "these activations stay float")
        model = quantize(traced.module, weight_bit_width, act_bit_width, weight_quant=weight_quant, inplace=True, **options)
    device = next(model.parameters()).device
    for name, bit_width in bit_widths.items():
        if name.startswith("input_quant"):
            quantizer = qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, bit_width=input_bit_width)
        else:
            quantizer = qnn.QuantIdentity(act_quant=SIGNED_STATIC, bit_width=bit_width)
        model.set_submodule(name, quantizer.train(model.get_submodule(name).training).to(device))
    return model


class _Placement:
    """Puts an nn.Identity wherever a quantizer is to stand that is not a ReLU's."""

    def __init__(self, traced: TracedModel, residual_bit_width: int, pool_bit_width: int) -> None:
        self.traced, self.graph = traced, traced.module.graph
        self.residual_bit_width, self.pool_bit_width = residual_bit_width, pool_bit_width
        self.integers: set[fx.Node] = set()
        self.bit_widths: dict[str, int | None] = {}
        self.quantized: dict[fx.Node, fx.Node] = {}

    def place(self) -> dict[str, int | None]:
        """Name of each new module -> its bit width (None: the input's)."""
        for node in self.traced.nodes:
            role = self.traced.role(node)
            if role is Role.INPUT:
                self._behind(node, "input_quant", None)
            elif self._is_global_pool(node, role):
                self._behind(self._as_adaptive_pool(node), "pool_quant", self.pool_bit_width)
            elif role is Role.SUM:
                shared = self._new("residual_quant", self.residual_bit_width)
                node.args = tuple(self._in_front(node, a, shared) if isinstance(a, fx.Node) else a for a in node.args)
                self.integers.add(node)
            elif role is Role.CONCAT or (role is Role.LAYER and not isinstance(self.traced.called(node), _BatchNorm)):
                for source in node.all_input_nodes:
                    if source not in self.integers:
                        node.replace_input_with(source, self._quantized(source))
                if role is Role.CONCAT:
                    self.integers.add(node)
            elif relu_class(node, self.traced.module) or (self._keeps_integers(node, role) and all(
                    n in self.integers for n in node.all_input_nodes if n not in self.traced.values)):
                self.integers.add(node)
        self.graph.lint()
        self.traced.module.recompile()
        return self.bit_widths

    def _keeps_integers(self, node: fx.Node, role: Role) -> bool:
        if role in (Role.ELEMENTWISE, Role.REARRANGEMENT):
            return node.target not in BY_A_NUMBER
        return isinstance(self.traced.called(node), _MAX_POOLS) or node.target in _MAX_POOL_FUNCTIONS

    def _new(self, kind: str, bit_width: int | None) -> str:
        name = next(n for n in (f"{kind}_{i}" for i in itertools.count()) if not hasattr(self.traced.module, n))
        self.traced.module.add_submodule(name, nn.Identity().train(self.traced.module.training))
        self.bit_widths[name] = bit_width
        return name

    def _in_front(self, node: fx.Node, source: fx.Node, name: str) -> fx.Node:
        with self.graph.inserting_before(node):
            return self.graph.call_module(name, (source, ))

    def _quantized(self, source: fx.Node) -> fx.Node:
        """``source``, quantized for the layers that read it in float; once for all of them."""
        if source not in self.quantized:
            with self.graph.inserting_after(source):
                self.quantized[source] = self.graph.call_module(self._new("layer_input_quant", self.residual_bit_width), (source, ))
            self.integers.add(self.quantized[source])
        return self.quantized[source]

    def _behind(self, node: fx.Node, kind: str, bit_width: int | None) -> None:
        with self.graph.inserting_after(node):
            new = self.graph.call_module(self._new(kind, bit_width), (node, ))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.integers.add(new)
        if node in self.traced.shapes:
            self.traced.shapes[new] = self.traced.shapes[node]

    # --- global pooling

    def _is_global_pool(self, node: fx.Node, role: Role) -> bool:
        sources = [n for n in node.all_input_nodes if n in self.traced.shapes]
        if len(sources) != 1 or len(self.traced.shapes[sources[0]]) != 4:
            return False
        spatial = tuple(self.traced.shapes[sources[0]][2:])
        module = self.traced.called(node)
        if role is Role.REDUCTION and node.target in (torch.mean, "mean"):
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            return isinstance(dim, (tuple, list)) and {d % 4 for d in dim} == {2, 3}
        if role is not Role.SPATIAL or tuple(self.traced.shapes[node][2:]) != (1, 1):
            return False
        if isinstance(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d:
            return True
        if isinstance(module, nn.AvgPool2d):
            size, padding = module.kernel_size, module.padding
        elif node.target is F.avg_pool2d and len(node.args) == 2 and not node.kwargs:
            size, padding = self.traced.values.get(node.args[1], node.args[1]), 0
        else:
            return False
        return (size if isinstance(size, tuple) else (size, size)) == spatial and padding in (0, (0, 0))

    def _as_adaptive_pool(self, node: fx.Node) -> fx.Node:
        """``node``, or the nn.AdaptiveAvgPool2d(1) that takes its place."""
        if isinstance(self.traced.called(node), nn.AdaptiveAvgPool2d):
            return node
        name = next(n for n in (f"global_pool_{i}" for i in itertools.count()) if not hasattr(self.traced.module, n))
        self.traced.module.add_submodule(name, nn.AdaptiveAvgPool2d(1))
        with self.graph.inserting_before(node):
            pool = last = self.graph.call_module(name, (node.all_input_nodes[0], ))
        if len(self.traced.shapes[node]) == 2:
            self.traced.module.add_submodule(f"{name}_flatten", nn.Flatten(1))
            with self.graph.inserting_after(pool):
                last = self.graph.call_module(f"{name}_flatten", (pool, ))
            self.integers.add(last)
        node.replace_all_uses_with(last)
        self.graph.erase_node(node)
        return pool
