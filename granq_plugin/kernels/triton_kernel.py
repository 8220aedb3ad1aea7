"""The dynamic quantizer on GPU, in Triton: a row of values that share a range stays on chip, read once and written once.

Short rows that begin anywhere have a kernel of their own (:mod:`~granq_plugin.kernels.triton_short`), as have rows too long for
one program (:mod:`~granq_plugin.kernels.triton_split`). Imported where there is a GPU, or where ``GRANQ_KERNEL=triton`` asks for
it: with ``TRITON_INTERPRET=1`` it runs on CPU tensors. Results are those of :func:`granq_plugin.functional.granq` bit for bit; see
:mod:`~granq_plugin.kernels.triton_math`.
"""

import os
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from granq_plugin.functional import GranQResult
from granq_plugin.kernels import gradients, triton_short, triton_split
from granq_plugin.kernels.layout import Ahead, Before, Layout
from granq_plugin.kernels.triton_launch import Fastest, Launch
from granq_plugin.kernels.triton_math import (
    _ends,
    _norms_of,
    _places,
    _quantize,
    _ranges_of,
    _values,
    _wider,
    clamp_kind,
    level_arguments,
    norm_arguments,
)

__all__ = ["HOPPER", "granq", "reads"]

HOPPER = 132, 232448  # multiprocessors of an H100 or H200, and shared memory that a program can have
_LARGEST = 16384  # values of a tile


@triton.jit
def _block(
        first, x_ptr, mask_ptr, residual_ptr, alpha, beta, channel, channels, row_stride, step, n, low, high, above, below,
        nan_passes, NORM: tl.constexpr, CLAMP: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Values of rows, from the first on, where they are, which are there, and what to find their ends in."""
    address, inside = _places(channel, first + tl.arange(0, BLOCK), channels, row_stride, step, n, EVEN)
    x, passes = _values(
        x_ptr, residual_ptr, address, inside, alpha[:, None], beta[:, None], low, high, above, below, nan_passes, NORM, CLAMP)
    if MASK:
        tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
    least, most = _ends(x, inside, EVEN)
    return x, address, inside, least, most


@triton.jit
def _folded(least, most, other_least, other_most):
    """Ends in a block and in a shorter one, which are then to be found in that one: a thread has what it compares."""
    ROWS: tl.constexpr = least.shape[0]
    BLOCK: tl.constexpr = other_least.shape[1]
    if least.shape[1] > BLOCK:
        PARTS: tl.constexpr = least.shape[1] // BLOCK
        least, most = tl.reduce(
            (tl.reshape(least, [ROWS, PARTS, BLOCK]), tl.reshape(most, [ROWS, PARTS, BLOCK])), 1, _wider)
    return _wider(least, most, other_least, other_most)


@triton.jit
def _rows(
        t, x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, eps, channels,
        row_stride, sample_stride, step, n, tiles, half_levels, overflow, smallest, low, high, above, below, largest, nan_passes,
        NORM: tl.constexpr, CLAMP: tl.constexpr, MASK: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
        FULL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr):
    """Quantizes tile t: some channels of a sample, a row each, in one to three blocks."""
    sample = t // tiles
    first = t % tiles * ROWS
    channel = first + tl.arange(0, ROWS)
    exists = tl.full([ROWS], 1, tl.int1) if FULL else channel < channels
    x_ptr += sample.to(tl.int64) * sample_stride
    y_ptr += sample.to(tl.int64) * sample_stride
    mask_ptr += sample.to(tl.int64) * sample_stride
    residual_ptr += sample.to(tl.int64) * sample_stride
    alpha, beta = _norms_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, first, channels, NORM, ROWS)
    x, address, inside, least, most = _block(
        0, x_ptr, mask_ptr, residual_ptr, alpha, beta, channel, channels, row_stride, step, n, low, high, above, below, nan_passes,
        NORM, CLAMP, MASK, FULL if SECOND else EVEN, BLOCK)
    if SECOND:
        x2, address2, inside2, least2, most2 = _block(
            BLOCK, x_ptr, mask_ptr, residual_ptr, alpha, beta, channel, channels, row_stride, step, n, low, high, above, below,
            nan_passes, NORM, CLAMP, MASK, FULL, SECOND)
        least, most = _folded(least, most, least2, most2)
    if THIRD:
        x3, address3, inside3, least3, most3 = _block(
            BLOCK + SECOND, x_ptr, mask_ptr, residual_ptr, alpha, beta, channel, channels, row_stride, step, n, low, high, above,
            below, nan_passes, NORM, CLAMP, MASK, EVEN, THIRD)
        least, most = _folded(least, most, least3, most3)
    lo, hi = tl.reduce((least, most), 1, _wider)
    scale, inv_scale, offset, fast = _ranges_of(lo, hi, exists, half_levels, overflow, smallest, FAST)
    tl.store(scale_ptr + sample * channels + channel, scale, mask=exists)
    tl.store(zero_point_ptr + sample * channels + channel, 0.0 - offset, mask=exists)
    _quantize(
        y_ptr, address, inside, x, scale[:, None], inv_scale[:, None], offset[:, None], fast, largest, NARROW)
    if SECOND:
        _quantize(
            y_ptr, address2, inside2, x2, scale[:, None], inv_scale[:, None], offset[:, None], fast, largest, NARROW)
    if THIRD:
        _quantize(
            y_ptr, address3, inside3, x3, scale[:, None], inv_scale[:, None], offset[:, None], fast, largest, NARROW)


@triton.jit
def _granq(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, eps, channels,
        row_stride, sample_stride, step, n, tiles, half_levels, overflow, smallest, low, high, above, below, largest, nan_passes,
        total, programs, NORM: tl.constexpr, CLAMP: tl.constexpr, MASK: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr,
        EVEN: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
        STAGES: tl.constexpr):
    if STAGES == 1:
        _rows(tl.program_id(0), x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
              residual_ptr, eps, channels, row_stride, sample_stride, step, n, tiles, half_levels, overflow, smallest, low, high,
              above, below, largest, nan_passes, NORM, CLAMP, MASK, NARROW, FAST, EVEN, FULL, ROWS, BLOCK, SECOND, THIRD)
    else:  # the next tiles are on their way while one is quantized
        for t in tl.range(tl.program_id(0), total, programs, num_stages=STAGES):
            _rows(t, x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, eps,
                  channels, row_stride, sample_stride, step, n, tiles, half_levels, overflow, smallest, low, high, above, below,
                  largest, nan_passes, NORM, CLAMP, MASK, NARROW, FAST, EVEN, FULL, ROWS, BLOCK, SECOND, THIRD)


class Tile(NamedTuple):
    """What a program has: rows, places for the values of each (in up to three blocks), warps; loads on their way at a time, while
    it quantizes others."""
    rows: int
    blocks: tuple[int, int, int]
    warps: int
    stages: int = 1


def _tile(layout: Layout, item_size: int, loads: int, shared_memory: int) -> Tile | None:
    """What was fastest on an H200; None: rows do not stay on chip. loads: tensors that are read, values of item_size bytes."""
    n, channels = layout.outer * layout.inner, triton.next_power_of_2(layout.channels)
    block = triton.next_power_of_2(n)
    if layout.side_by_side:  # channels_last: all channels, or segments of 64 bytes or more of neighbouring ones
        rows = min(32, _LARGEST // block)
        if rows < channels and rows * item_size < 64:
            return None
        rows = min(rows, channels)
        warps = rows * block // (1024 if rows * block < _LARGEST // 2 else 2048)
    elif n > _LARGEST:
        return None
    else:
        rows = min(max(1, 512 // block), channels)
        warps = rows * block // (512 if block < 4096 else 1024)
    buffers = 2 * loads * _LARGEST * item_size  # and some for conversions
    goes_on = _loads_go_on(layout, item_size) and buffers + 3 * 2**13 <= shared_memory
    stages = 3 if rows * block == _LARGEST and goes_on else 1
    return Tile(rows, _powers(n) if layout.side_by_side else (block, 0, 0), max(1, min(16, warps)), stages)


def _loads_go_on(layout: Layout, item_size: int) -> bool:
    """Whether loads go on beside other work: they have at least 4 bytes, and single values where wider loads may not begin."""
    return item_size >= 4 or (layout.channels if layout.side_by_side else layout.outer * layout.inner) % 16 == 0


def _powers(n: int) -> tuple[int, int, int]:
    """Powers of two for n places; the last one may have some more."""
    first = 1 << n.bit_length() - 1
    second = 1 << (n - first).bit_length() - 1 if n > first else 0
    left = n - first - second
    return first, second, triton.next_power_of_2(left) if left else 0


def _keeping(layout: Layout, item_size: int, loads: int, chip: tuple[int, int]) -> int:
    """Programs that keep parts of long rows and run at a time."""
    processors, shared_memory = chip
    return _loads_go_on(layout, item_size) * processors * triton_split.together(loads * item_size, shared_memory)


def reads(layout: Layout, item_size: int, loads: int = 1) -> int:
    """How often an H100 or H200 reads memory, where programs that share rows keep their parts if they can: it may be faster to read
    them twice, and to find them in the cache. loads: tensors that are read."""
    if _tile(layout, item_size, loads, HOPPER[1]) is not None:
        return 1
    *_, parts = triton_split.tile(layout.channels, layout.outer * layout.inner, not layout.side_by_side)
    return 1 if parts <= _keeping(layout, item_size, loads, HOPPER) else 2


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program can fill while it does other work: none before Ampere, and none of
    AMD's, for which Triton has other options."""
    if device.type != "cuda":
        return 2, 2**18  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    fills = properties.major >= 8 and torch.version.hip is None
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 0) if fills else 0
    return properties.multi_processor_count, shared_memory


@lru_cache(maxsize=1024)
def _launch(layout: Layout, dtype: torch.dtype, device: torch.device, bit_width: int, before: Before, norm: int, eps: float,
            needs_mask: bool) -> Callable[..., None]:
    """Of ``x, y, mask, scale, zero_point``, and what :func:`norm_arguments` gives."""
    samples, outer, channels, inner = layout[:4]
    n = outer * inner
    _, *limits, nan_passes = before.limits(dtype)
    numbers = *level_arguments(bit_width), *limits, torch.finfo(dtype).max, nan_passes
    constants = dict(
        NORM=norm, CLAMP=clamp_kind(before), MASK=needs_mask, NARROW=dtype != torch.float32,
        FAST=int(os.environ.get("TRITON_INTERPRET") != "1"),  # which does not fuse what is to be fused
        enable_fp_fusion=False)
    if outer == 1 and triton_short.suits(n):
        return triton_short.launch(samples, channels, n, eps, numbers, constants)
    geometry = channels, inner, outer * channels * inner, channels if layout.side_by_side else 1, n
    chip = processors, shared_memory = _chip(device)
    loads = 1 + (norm == 2)
    tile = _tile(layout, dtype.itemsize, loads, shared_memory)
    keep = []
    if tile is None or (tile.stages > 1 and layout.side_by_side):  # or one program on a multiprocessor, whose loads are short
        first, *keep = triton_split.launches(
            samples, geometry, eps, numbers, constants, _keeping(layout, dtype.itemsize, loads, chip),
            patience=triton_split.PATIENCE if device.type == "cuda" else 1)  # the interpreter runs one program after the other
    if tile is not None:
        first = _on_chip(tile, samples, geometry, eps, numbers, constants, processors)
    return Fastest(first, *keep) if keep else first


def _on_chip(
        tile: Tile, samples: int, geometry: tuple, eps: float, numbers: tuple, constants: dict, processors: int) -> Launch:
    channels, *_, n = geometry
    tiles = triton.cdiv(channels, tile.rows)
    total = samples * tiles
    programs = total if tile.stages == 1 else min(total, processors)
    full = channels % tile.rows == 0
    block, second, third = tile.blocks
    return Launch(_granq, (programs, ), (eps, *geometry, tiles, *numbers, total, programs), constants | dict(
        EVEN=full and sum(tile.blocks) == n, FULL=full, ROWS=tile.rows, BLOCK=block, SECOND=second, THIRD=third,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages))


def _forward(x: Tensor, bit_width: int, layout: Layout, before: Before, ahead: Ahead | None, needs_mask: bool):
    y, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool) if needs_mask else None
    scale = torch.empty(layout.scale_shape, dtype=torch.float32, device=x.device)
    zero_point = torch.empty_like(scale)
    norm, norms, eps = norm_arguments(x, ahead)
    launch = _launch(layout, x.dtype, x.device, bit_width, before, norm, eps, needs_mask)
    launch(x, y, mask.view(torch.int8) if needs_mask else x, scale, zero_point, *norms)
    return y, scale, zero_point, mask


def _masked(grad: Tensor, mask: Tensor, scale: None, layout: Layout) -> Tensor:
    return torch.where(mask, grad, 0)


def granq(x: Tensor, bit_width: int, layout: Layout, before: Before, ahead: Ahead | None) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`."""
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        return gradients.granq(_forward, _masked, x, bit_width, layout, before, ahead)
