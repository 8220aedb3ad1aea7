"""How a tensor lies in memory, as the kernels see it, and what is done to its values before they are quantized."""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IDENTITY", "Ahead", "Before", "Layout", "layout_of", "static_layout_of", "whole_layout_of"]


class Layout(NamedTuple):
    """A tensor as ``[samples, outer, channels, inner]`` in memory. Ranges are per (sample, channel).

    Attributes:
        samples, outer, channels, inner: outer == 1 is the contiguous layout, inner == 1 channels_last.
        memory_format: of the tensor. scale_shape: of its scales, where they are computed.
    """
    samples: int
    outer: int
    channels: int
    inner: int
    memory_format: torch.memory_format
    scale_shape: tuple[int, ...]

    @property
    def side_by_side(self) -> bool:
        """Whether values of neighbouring channels are neighbours, and those of a channel lie apart."""
        return self.outer > 1 and self.inner == 1


def layout_of(x: Tensor, channel_axis: int) -> Layout | None:
    """The layout of a dense tensor with values and a channel axis; None for any other."""
    return _layout(x.shape, x.stride(), channel_axis)


def static_layout_of(x: Tensor, channel_axis: int) -> Layout | None:
    """The layout of a dense tensor with one range per channel over all samples; None for any other."""
    return _static_layout(x.shape, x.stride(), channel_axis)


def whole_layout_of(x: Tensor, channel_axis: int) -> Layout | None:
    """The layout of a dense tensor with one range for all values, as a row for each sample; None for any other."""
    return _whole_layout(x.shape, x.stride())


@lru_cache(maxsize=1024)
def _layout(shape: torch.Size, strides: tuple[int, ...], channel_axis: int) -> Layout | None:
    dim = len(shape)
    axis = channel_axis + dim if channel_axis < 0 else channel_axis
    memory_format = _memory_format(shape, strides)
    if not 0 < axis < dim or memory_format is None:
        return None
    if dim == 2:
        return Layout(shape[0], 1, 1, shape[1], memory_format, (shape[0], 1))
    scale_shape = tuple(n if d in (0, axis) else 1 for d, n in enumerate(shape))
    if memory_format == torch.contiguous_format:
        outer, inner = math.prod(shape[1:axis]), math.prod(shape[axis + 1:])
        return Layout(shape[0], outer, shape[axis], inner, memory_format, scale_shape) if 1 in (outer, inner) else None
    return Layout(shape[0], math.prod(shape[2:]), shape[1], 1, memory_format, scale_shape) if axis == 1 else None


@lru_cache(maxsize=1024)
def _static_layout(shape: torch.Size, strides: tuple[int, ...], channel_axis: int) -> Layout | None:
    dim = len(shape)
    axis = channel_axis + dim if channel_axis < 0 else channel_axis
    memory_format = _memory_format(shape, strides)
    if not 0 <= axis < dim or memory_format is None:
        return None
    if memory_format == torch.contiguous_format:
        samples, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1:])
    elif axis > 1:
        return None
    else:
        samples, inner = (1, math.prod(shape[1:])) if axis == 0 else (math.prod(shape) // shape[1], 1)
    outer, samples = (samples, 1) if inner == 1 else (1, samples)
    return Layout(samples, outer, shape[axis], inner, memory_format, ())


@lru_cache(maxsize=1024)
def _whole_layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout | None:
    memory_format = _memory_format(shape, strides)
    return Layout(shape[0], 1, 1, math.prod(shape[1:]), memory_format, ()) if memory_format and shape else None


def _memory_format(shape: torch.Size, strides: tuple[int, ...]) -> torch.memory_format | None:
    """Of a dense tensor with values; None for any other."""
    if 0 in shape:
        return None
    x = torch.empty_strided(shape, strides, device="meta")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    allowed = (torch.contiguous_format, *filter(None, [formats.get(len(shape))]))
    return next((f for f in allowed if x.is_contiguous(memory_format=f)), None)


class Before(NamedTuple):
    """What happens to a value before it is quantized: ReLU, then a clamp; either may be missing.

    Attributes:
        relu: whether there is a ReLU. min_val, max_val: ends of the clamp, or None.
    """
    relu: bool = False
    min_val: float | None = None
    max_val: float | None = None

    def apply(self, x: Tensor, ahead: "Ahead | None" = None) -> Tensor:
        """The same as separate operations of torch, those of ``ahead`` first."""
        if ahead is not None:
            x = ahead.apply(x)
        if self.relu:
            x = torch.relu(x)
        if self.min_val is not None or self.max_val is not None:
            x = x.clamp(self.min_val, self.max_val)
        return x

    def limits(self, dtype: torch.dtype) -> tuple[int, float, float, float, float, int]:
        """``(clamp, low, high, above, below, nan)``: values are clamped to [low, high] if clamp is set; the gradient passes
        strictly between above and below (NaN: no limit), and for NaN if nan is set."""
        return _limits(self, dtype)


@lru_cache(maxsize=256)
def _limits(before: Before, dtype: torch.dtype) -> tuple[int, float, float, float, float, int]:
    def in_dtype(v: float) -> float:
        return torch.tensor(v, dtype=dtype, device="cpu").item()

    def beyond(limit: float, end: float) -> float:
        if not _gradient_passes_at_limits():
            return limit
        wide = torch.promote_types(dtype, torch.float32)
        return torch.nextafter(*(torch.tensor(v, dtype=wide, device="cpu") for v in (limit, end))).item()

    low, high, above, below = -math.inf, math.inf, math.nan, math.nan
    if before.min_val is not None:
        low = in_dtype(before.min_val)
        above = beyond(low, -math.inf)
    if before.max_val is not None:
        high = in_dtype(before.max_val)
        below = beyond(high, math.inf)
    clamped = before.min_val is not None or before.max_val is not None
    if before.relu:
        low, above = max(low, 0.0), 0.0 if math.isnan(above) else max(above, 0.0)
    low = min(low, high)  # where the ends are crossed torch.clamp gives the upper one
    return int(before.relu or clamped), low, high, above, below, int(not clamped)


@cache
def _gradient_passes_at_limits() -> bool:
    """Whether torch's clamp hands on the gradient of a value that equals a limit: it depends on the version."""
    with torch.enable_grad():
        x = torch.ones((), requires_grad=True, device="cpu")
        return torch.autograd.grad(x.clamp(max=1.0), x)[0].item() != 0


IDENTITY = Before()


class Ahead(NamedTuple):
    """What comes ahead of :class:`Before`: BatchNorm in evaluation mode, and then the addition of another tensor, if there is one.

    Attributes:
        mean, var, weight, bias: ``[C]``; the last two may be None. eps: as BatchNorm's.
        residual: of the shape of the values, or None.
    """
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """The same as separate operations of torch, of x ``[B, C, *spatial]``."""
        y = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False, 0.0, self.eps)
        return y if self.residual is None else y + self.residual

    @property
    def leaves(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What gradients reach, beside the values."""
        return self.weight, self.bias, self.residual
