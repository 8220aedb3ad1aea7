"""Integer sums kept away from rounding ties, so that every program rounds a folded network alike: :func:`clear_ties`.

In a folded network a layer adds up integers: before the next quantizer rounds them, its sums can take only the values
``alpha n + beta`` of each channel, n an integer. Where one of these lies on a rounding tie, to within the last bits of float32,
programs that add in different orders (torch, onnxruntime, an accelerator's thresholds) choose different integers, at every pixel
with that sum. Moving beta by less than a hundredth of a step puts the tie between two sums instead.
"""

from dataclasses import dataclass

import numpy as np
import torch
from brevitas.nn.quant_layer import QuantNonLinearActLayer, QuantWeightBiasInputOutputLayer
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from granq_plugin import functional as GF
from granq_plugin.deploy.graph import Role, TracedModel, trace_quantized
from granq_plugin.modules import check_module, copy_model

__all__ = ["ClearedLayer", "clear_ties"]

@dataclass(frozen=True)
class ClearedLayer:
    """A layer in front of a quantizer.

    Attributes:
        name: the layer's. largest_shift: how far a channel's bias was moved, at most, in steps of the quantizer.
        margin_before, margin: distance of the nearest possible sum from a tie, in steps, over all channels.
    """
    name: str
    largest_shift: float
    margin_before: float
    margin: float


@dataclass(frozen=True)
class _Grid:
    """The values that a node can take: ``step * n``, n an integer of at most ``bound``; per channel, or for all (0-d)."""
    step: np.ndarray
    bound: np.ndarray


def clear_ties(
        model: nn.Module,
        example_input,
        *,
        max_shift: float = 0.01,
        enough: float = 1e-3,
        inplace: bool = False) -> tuple[nn.Module, list[ClearedLayer]]:
    """Move the biases in front of a folded network's quantizers, so that no integer sum lies on a rounding tie.

    Args:
        model: from :func:`fold` (baked). example_input: as for :func:`fold`.
        max_shift: how far a bias may be moved, in steps of the quantizer behind it, below 0.5.
        enough: channels whose sums are all this far from a tie, in steps, are left alone.
        inplace: change the modules of ``model`` itself; otherwise a deep copy's.

    Returns:
        The model, and one :class:`ClearedLayer` for each batch normalization, or layer with a bias, between integer sums and a
        quantizer.

    Raises:
        TypeError, ValueError: if model is no module, cannot be traced or run, has no such layer, or max_shift is not in (0, 0.5).

    Example:
        >>> from granq_plugin import to_static
        >>> from granq_plugin.deploy import fold, prepare
        >>> images = torch.rand(16, 3, 6, 6)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
        >>> deployed, cleared = clear_ties(fold(to_static(prepare(net, images[:1]), [images]), images[:1]), images[:1])
        >>> all(layer.margin >= layer.margin_before for layer in cleared)
        True
    """
    check_module(model)
    if not 0 < max_shift < 0.5:
        raise ValueError(f"max_shift must be in (0, 0.5), got {max_shift!r}")
    model = model if inplace else copy_model(model)
    traced = trace_quantized(model)
    traced.run(example_input)
    cleared = []
    for node in traced.nodes:
        proxy = _unit_quantizer(traced, node)
        layer = traced.called(node.all_input_nodes[0]) if proxy is not None else None
        calls = [n for n in traced.nodes if n.op == "call_module" and traced.called(n) is layer]
        if getattr(layer, "bias", None) is None or len(calls) != 1 or len(calls[0].users) != 1:
            continue  # a bias that others read too is not this quantizer's to move
        sums = _sums(traced, calls[0])
        if sums is not None:
            cleared.append(_clear(calls[0].target, layer, *sums, _limits(proxy), max_shift, enough))
    if not cleared:
        raise ValueError("model has no layer with a bias between integer sums and a quantizer of scale 1: fold() it first")
    return model, cleared


def _unit_quantizer(traced: TracedModel, node: fx.Node):
    """The proxy of a quantizer with the scale 1; None for any other node."""
    module = traced.called(node)
    if not isinstance(module, QuantNonLinearActLayer) or not module.act_quant.is_quant_enabled:
        return None
    scale = _scalar_scale(module.act_quant)
    return module.act_quant if scale == 1 else None


def _scalar_scale(proxy) -> float | None:
    try:
        scale = proxy.scale()
    except RuntimeError:  # dynamic, or no range yet
        return None
    return scale.item() if scale is not None and scale.numel() == 1 else None


def _limits(proxy) -> tuple[int, int]:
    return GF.integer_limits(int(proxy.bit_width()), bool(proxy.is_signed), bool(proxy.is_narrow_range))


def _sums(traced: TracedModel, node: fx.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """``(alpha, beta, bound)`` per channel of a layer whose values are ``alpha n + beta``, n up to bound; None if they are not."""
    module = traced.called(node)
    if isinstance(module, QuantWeightBiasInputOutputLayer):
        grid = _layer_grid(traced, node, module)
        return None if grid is None else (grid.step, 0.0 if module.bias is None else _array(module.bias), grid.bound)
    if not isinstance(module, _BatchNorm):
        return None
    source = node.all_input_nodes[0]
    behind = _sums(traced, source) if isinstance(traced.called(source), QuantWeightBiasInputOutputLayer) else None
    if behind is None:
        grid = _grid(traced, source)
        if grid is None:
            return None
        behind = grid.step, 0.0, grid.bound
    step, offset, bound = behind
    factor = _array(module.weight) / np.sqrt(_array(module.running_var) + module.eps)
    return factor * step, factor * (offset - _array(module.running_mean)) + _array(module.bias), bound


def _grid(traced: TracedModel, node: fx.Node) -> _Grid | None:
    """The grid of a node's values, if it has one for all channels, or is a layer's without a bias."""
    module, role, sources = traced.called(node), traced.role(node), node.all_input_nodes
    if isinstance(module, QuantNonLinearActLayer):
        scale = _scalar_scale(module.act_quant) if module.act_quant.is_quant_enabled else None
        return None if scale is None else _Grid(np.array(scale), np.array(max(abs(n) for n in _limits(module.act_quant))))
    if isinstance(module, QuantWeightBiasInputOutputLayer):
        return _layer_grid(traced, node, module) if module.bias is None else None
    if isinstance(module, nn.AdaptiveAvgPool2d):
        grid, pixels = _grid(traced, sources[0]), traced.shapes[sources[0]][2:].numel()
        whole = grid is not None and traced.shapes[node][2:].numel() == 1
        return _Grid(grid.step / pixels, grid.bound * pixels) if whole else None
    keeps_integers = role in (Role.SUM, Role.CONCAT, Role.REARRANGEMENT) or isinstance(
        module, (nn.ReLU, nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d))
    grids = [_grid(traced, n) for n in sources if n not in traced.values] if keeps_integers else []
    if not grids or any(g is None or g.step.ndim for g in grids) or len({float(g.step) for g in grids}) > 1:
        return None
    return _Grid(grids[0].step, np.array((sum if role is Role.SUM else max)(g.bound for g in grids)))


def _layer_grid(traced: TracedModel, node: fx.Node, layer: nn.Module) -> _Grid | None:
    """A layer's sums without its bias: the step of its input times the scale of its weights, per output channel."""
    grid = _grid(traced, node.all_input_nodes[0])
    if grid is None or grid.step.ndim or not layer.weight_quant.is_quant_enabled or layer.input_quant.is_quant_enabled:
        return None
    weight, axis = layer.quant_weight(), layer.output_channel_dim
    if weight.zero_point.any() or weight.scale.numel() not in (1, weight.value.shape[axis]):
        return None
    others = [d for d in range(weight.value.dim()) if d != axis]
    integers = (weight.value / weight.scale).round().abs().sum(others)
    return _Grid(grid.step * _array(weight.scale.flatten()), grid.bound * _array(integers))


def _array(t: Tensor) -> np.ndarray:
    return t.detach().double().cpu().numpy()


@torch.no_grad()
def _clear(name: str, layer: nn.Module, alpha, beta, bound, limits, max_shift: float, enough: float) -> ClearedLayer:
    channels = zip(*np.broadcast_arrays(alpha, beta, bound, np.zeros(layer.bias.numel()))[:3])
    found = [_shift(*channel, limits, max_shift, enough) for channel in channels]
    layer.bias.add_(torch.tensor([shift for shift, _, _ in found], dtype=torch.float64).to(layer.bias))
    return ClearedLayer(name, max(abs(s) for s, _, _ in found), min(b for _, b, _ in found), min(m for _, _, m in found))


def _shift(alpha, beta, bound, limits: tuple[int, int], max_shift: float, enough: float) -> tuple[float, float, float]:
    """``(shift, margin before, margin after)`` of one channel: 0, or into the middle of the widest gap within max_shift."""
    if alpha == 0:  # a dead channel: a single value
        offsets = np.array([(beta - 0.5) % 1.0])
    else:
        ends = np.sort([(limits[0] - 1 - beta) / alpha, (limits[1] + 1 - beta) / alpha])  # beyond them all is clamped
        first, last = max(ends[0], -bound), min(ends[1], bound)
        offsets = (alpha * np.arange(np.ceil(first), np.floor(last) + 1) + beta - 0.5) % 1.0
    offsets = np.where(offsets > 0.5, offsets - 1, offsets)  # of every possible value from its nearest tie, in (-0.5, 0.5]
    before = float(np.abs(offsets).min(initial=0.5))
    if before >= enough:
        return 0.0, before, before
    ties = np.sort(np.concatenate([-offsets - 1, -offsets, -offsets + 1]))  # the shifts that put a value on a tie
    left, right = np.clip(ties[:-1], -max_shift, max_shift), np.clip(ties[1:], -max_shift, max_shift)
    middles = np.clip((ties[:-1] + ties[1:]) / 2, left, right)
    margins = np.minimum(middles - ties[:-1], ties[1:] - middles)
    best = int(margins.argmax())
    return float(middles[best]), before, float(margins[best])
