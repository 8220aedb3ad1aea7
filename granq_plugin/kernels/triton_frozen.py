"""The quantizer of frozen ranges on GPU, in Triton: forward and backward each read their tensors once.

Results are those of :func:`granq_plugin.functional.affine_quantize` bit for bit; see :mod:`~granq_plugin.kernels.triton_math`.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from granq_plugin.kernels import gradients
from granq_plugin.kernels.layout import Ahead, Before, Layout
from granq_plugin.kernels.triton_launch import Launch
from granq_plugin.kernels.triton_math import (
    _largest,
    _least,
    _norm_of,
    _round,
    _stored,
    _values,
    clamp_kind,
    norm_arguments,
)

__all__ = ["affine_quantize"]

_TILE = 1024  # values of a program, where rows are short
_BLOCKS = (4096, 2048, 1024)  # of long rows: the one that leaves the fewest places empty
_MOST_COLUMNS = 2**27  # of channels that have several


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr, channels, INNER: tl.constexpr):
    """Addresses, which of them exist, and the channel of each row, or of INNER columns each."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    address = r.to(tl.int64)[:, None] * columns + c[None, :]
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    if INNER:
        channel = tl.minimum(c // INNER, channels - 1)[None, :]
    else:
        channel = (r % channels)[:, None]
    return address, inside, channel


@triton.jit
def _frozen(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, eps, rows,
        columns, channels, lowest, highest, low, high, above, below, nan_passes, NORM: tl.constexpr, CLAMP: tl.constexpr,
        MASK: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    address, inside, channel = _tile(rows, columns, ROWS, BLOCK, channels, INNER)
    scale = tl.broadcast_to(tl.load(scale_ptr + channel), [ROWS, BLOCK])
    zero_point = tl.load(zero_point_ptr + channel)
    alpha, beta = _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, NORM)
    x, passes = _values(
        x_ptr, residual_ptr, address, inside, alpha, beta, low, high, above, below, nan_passes, NORM, CLAMP)
    q = _round(tl.div_rn(x, scale) + zero_point)
    if MASK:
        passes = passes * tl.where(q < lowest, 0, 1) * tl.where(q > highest, 0, 1)
        tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
    y = (_least(_largest(q, lowest), highest) - zero_point) * scale
    tl.store(y_ptr + address, _stored(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _frozen_backward(
        grad_ptr, out_ptr, mask_ptr, scale_ptr, rows, columns, channels, INNER: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr):
    address, inside, channel = _tile(rows, columns, ROWS, BLOCK, channels, INNER)
    scale = tl.broadcast_to(tl.load(scale_ptr + channel), [ROWS, BLOCK])
    grad = tl.load(grad_ptr + address, mask=inside, other=0.0).to(tl.float32)
    passes = tl.load(mask_ptr + address, mask=inside, other=0) != 0
    out = tl.where(passes, tl.div_rn(grad * scale, scale), 0.0)
    tl.store(out_ptr + address, _stored(out, out_ptr.dtype.element_ty), mask=inside)


def _sizes(layout: Layout) -> tuple[tuple[int, int], tuple[int, int, int], dict]:
    """Grid, ``(rows, columns, channels)`` and the constants of a layout; memory is ``[rows, columns]``. A channel has columns, one
    (channels_last) or as many as begin where wide loads may not, or rows."""
    samples, outer, channels, inner = layout[:4]
    by_column = inner == 1 or (channels > 1 and inner % 4 != 0 and channels * inner < _MOST_COLUMNS)
    rows, columns = (samples * outer, channels * inner) if by_column else (samples * channels, inner)
    block = triton.next_power_of_2(columns)
    if columns > _TILE:
        few = [b for b in _BLOCKS if triton.cdiv(columns, b) < 2**16] or _BLOCKS[:1]  # a grid has no more
        block = min(few, key=lambda b: triton.cdiv(columns, b) * b)
    tile_rows = min(max(1, _TILE // block), triton.next_power_of_2(rows))
    grid = triton.cdiv(rows, tile_rows), triton.cdiv(columns, block)
    return grid, (rows, columns, channels), dict(
        INNER=inner if by_column else 0, ROWS=tile_rows, BLOCK=block, num_warps=8 if block > 2048 else 4, enable_fp_fusion=False)


@lru_cache(maxsize=1024)
def _forward_launch(layout: Layout, dtype: torch.dtype, device: torch.device, limits: tuple[int, int], before: Before, norm: int,
                    eps: float, needs_mask: bool) -> Launch:
    """Of ``x, y, mask, scale, zero_point``, and what :func:`norm_arguments` gives; for tensors of that dtype and device."""
    _, *edges = before.limits(dtype)
    grid, sizes, constants = _sizes(layout)
    return Launch(_frozen, grid, (eps, *sizes, *map(float, limits), *edges), constants | dict(
        NORM=norm, CLAMP=clamp_kind(before), MASK=needs_mask))


@lru_cache(maxsize=1024)
def _backward_launch(layout: Layout, dtype: torch.dtype, device: torch.device) -> Launch:
    """Of ``grad, out, mask, scale``."""
    grid, sizes, constants = _sizes(layout)
    return Launch(_frozen_backward, grid, sizes, constants)


def _forward(x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout, before: Before,
             ahead: Ahead | None, needs_mask: bool) -> tuple[Tensor, Tensor | None]:
    y, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool) if needs_mask else None
    norm, norms, eps = norm_arguments(x, ahead)
    launch = _forward_launch(layout, x.dtype, x.device, tuple(limits), before, norm, eps, needs_mask)
    launch(x, y, mask.view(torch.int8) if needs_mask else x, scale, zero_point, *norms)
    return y, mask


def _masked(grad: Tensor, mask: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    grad = grad.contiguous(memory_format=layout.memory_format)
    out = torch.empty_like(grad)
    _backward_launch(layout, grad.dtype, grad.device)(grad, out, mask.view(torch.int8), scale)
    return out


def affine_quantize(
        x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout, before: Before,
        ahead: Ahead | None) -> Tensor:
    """See :func:`granq_plugin.kernels.affine_quantize`; scale and zero_point contiguous, float32, one element per channel."""
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        return gradients.affine_quantize(_forward, _masked, x, scale, zero_point, limits, layout, before, ahead)
