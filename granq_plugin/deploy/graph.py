"""What a traced network's nodes do to per-channel scales: the graph that folding and the FINN rules are written on."""

import operator
from enum import Enum, auto

import torch
import torch.nn.functional as F
from brevitas.nn.mixin.base import QuantLayerMixin
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from granq_plugin.relus import trace

__all__ = ["BY_A_NUMBER", "ChannelRescale", "Role", "TracedModel", "trace_quantized"]


class ChannelRescale(_BatchNorm):
    """``x * factors`` per channel (axis 1) as a batch normalization with constant statistics and eps 0, in every mode.

    hls4ml takes a rescale between two quantizers in this form only; the mean is 0 and the variance 1.
    """
    evaluates_as_batch_norm = True  # so that it is fused as one

    def __init__(self, factors: Tensor) -> None:
        super().__init__(factors.numel(), eps=0.0)
        self.weight = nn.Parameter(factors.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros_like(self.weight), requires_grad=False)
        self.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        # what F.batch_norm calls; some versions of that refuse eps 0 in evaluation, too
        return torch.batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.0, self.eps, False)


class Role(Enum):
    """What a node does to a tensor whose channels are held in different units."""
    INPUT = auto()
    OUTPUT = auto()
    QUANTIZER = auto()
    """a Brevitas activation layer"""
    LAYER = auto()
    """convolution, linear or batch normalization: its parameters can change the units"""
    SUM = auto()
    """adds two tensors of one shape, which must share their units"""
    CONCAT = auto()
    ELEMENTWISE = auto()
    """f(u x) = u f(x) for every element"""
    SPATIAL = auto()
    """f(u x) = u f(x) for every channel on axis 1: pooling, padding, resizing"""
    REDUCTION = auto()
    REARRANGEMENT = auto()
    """moves values without changing them"""
    OPAQUE = auto()
    """anything else: takes and gives real values"""
    CONSTANT = auto()
    """no tensor: sizes, shapes and arithmetic on them"""


_ELEMENTWISE = {F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, torch.neg, operator.neg, torch.clone,
                "relu", "relu_", "contiguous", "clone", "detach"}  # yapf: disable
BY_A_NUMBER = {
    operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div, "mul", "mul_", "div", "div_"}
_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_"}
_CONCATS = {torch.cat, torch.concat}
_SPATIAL = {getattr(F, f"{kind}_pool{d}d") for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)}
_SPATIAL |= {torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.interpolate}
_REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}
_REARRANGEMENTS = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk, torch.split,
    operator.getitem, F.pixel_shuffle, F.channel_shuffle, "flatten", "view", "reshape", "permute", "transpose", "squeeze",
    "unsqueeze", "chunk", "split"}  # yapf: disable
_MODULES = {
    Role.LAYER: (_ConvNd, nn.Linear, _BatchNorm),
    Role.ELEMENTWISE: (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    Role.SPATIAL: (
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d,
        nn.ReplicationPad2d, nn.ReplicationPad3d),
    Role.REARRANGEMENT: (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.ChannelShuffle),
}  # yapf: disable


class TracedModel:
    """A model's graph, the module of every call, and what each node gives for one example.

    Attributes:
        module: the GraphModule, which shares the model's modules.
        shapes: node -> shape of its tensor, or a tuple of shapes. values: node -> anything else that it gives.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.shapes: dict[fx.Node, tuple] = {}
        self.values: dict[fx.Node, object] = {}

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, if it is such a call."""
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def describe(self, node: fx.Node) -> str:
        """``'layer1.0.relu' (QuantReLU)`` or ``'softmax' (function softmax)``."""
        if node.op == "call_module":
            return f"'{node.target}' ({type(self.called(node)).__name__.removeprefix('Parametrized')})"
        name = getattr(node.target, "__name__", node.target)
        kind = dict(call_function="function", call_method="method").get(node.op)
        return f"'{node.name}' ({kind} {name})" if kind else f"'{node.name}' ({node.op})"

    def run(self, example_input) -> None:
        """Record the shapes and values that ``example_input``, a tensor or a tuple of them, gives in evaluation mode."""
        inputs = example_input if isinstance(example_input, (tuple, list)) else (example_input, )
        if not inputs or not all(isinstance(i, Tensor) for i in inputs):
            raise TypeError(f"example_input must be a tensor or a tuple of tensors, got {type(example_input).__name__}")
        modes = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad():
                _Recorder(self).run(*inputs)
        except (RuntimeError, ValueError) as e:
            given = f"{str(inputs[0].dtype).removeprefix('torch.')} {list(inputs[0].shape)}"
            raise ValueError(f"the model cannot run on example_input {given}: "
                             f"{str(e).splitlines()[0]}") from e
        finally:
            for m, mode in modes.items():
                m.training = mode

    def role(self, node: fx.Node) -> Role:
        if node in self.values:
            return Role.CONSTANT
        if node.op in ("placeholder", "output"):
            return Role.INPUT if node.op == "placeholder" else Role.OUTPUT
        if node.op == "call_module":
            return self._module_role(node)
        if node.op not in ("call_function", "call_method"):
            return Role.OPAQUE
        tensors = [n for n in node.all_input_nodes if n not in self.values]
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and a not in self.values]
        if node.target in _SUMS:
            same = len(operands) == 2 and all(self.shapes.get(n) == self.shapes.get(node) for n in operands)
            return Role.SUM if same else Role.OPAQUE
        if node.target is F.pad:
            return Role.SPATIAL if _pads_with_zeros(node) else Role.OPAQUE
        if node.target in BY_A_NUMBER:
            by_a_number = len(operands) == 1 and node.args and node.args[0] is operands[0]
            return Role.ELEMENTWISE if by_a_number else Role.OPAQUE
        for role, targets in ((Role.ELEMENTWISE, _ELEMENTWISE), (Role.CONCAT, _CONCATS), (Role.SPATIAL, _SPATIAL),
                              (Role.REDUCTION, _REDUCTIONS), (Role.REARRANGEMENT, _REARRANGEMENTS)):
            if node.target in targets:
                return role if role is Role.CONCAT or len(tensors) == 1 else Role.OPAQUE
        return Role.OPAQUE

    def _module_role(self, node: fx.Node) -> Role:
        module = self.called(node)
        if len(node.all_input_nodes) != 1:
            return Role.OPAQUE
        if isinstance(module, QuantNonLinearActLayer):
            return Role.QUANTIZER
        for role, classes in _MODULES.items():
            if isinstance(module, classes) and (role is Role.LAYER or not isinstance(module, QuantLayerMixin)):
                single = isinstance(self.shapes.get(node, torch.Size()), torch.Size)  # max pooling may return its indices
                return role if single else Role.OPAQUE
        return Role.OPAQUE


class _Recorder(fx.Interpreter):

    def __init__(self, traced: TracedModel) -> None:
        super().__init__(traced.module)
        self.traced = traced

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        if isinstance(result, QuantTensor):
            self.traced.shapes[node] = result.value.shape
        elif isinstance(result, Tensor):
            self.traced.shapes[node] = result.shape
        elif isinstance(result, (tuple, list)) and result and all(isinstance(r, Tensor) for r in result):
            self.traced.shapes[node] = tuple(r.shape for r in result)
        elif node.op != "output":
            self.traced.values[node] = result
        return result


def trace_quantized(model: nn.Module) -> TracedModel:
    """Trace ``model``, Brevitas layers kept whole, in evaluation mode; every module keeps the mode that it is in.

    Raises:
        ValueError: if the model cannot be traced.
    """
    training = model.training
    modes = {m: m.training for m in model.modules()}
    try:
        module = trace(model.eval(), (QuantLayerMixin, _BatchNorm))
    except Exception as e:  # tracing runs the user's forward: anything may come out of it
        raise ValueError(f"the model cannot be traced, so its scales cannot be followed ({type(e).__name__}: {e})") from e
    finally:
        for m, mode in modes.items():
            m.training = mode
    for m in module.modules():
        m.training = modes.get(m, training)
    return TracedModel(module)


def _pads_with_zeros(node: fx.Node) -> bool:
    mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
    return mode == "constant" and value in (None, 0, 0.0)
