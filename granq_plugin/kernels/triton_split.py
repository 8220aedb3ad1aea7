"""The dynamic quantizer on GPU for rows that do not stay on chip: programs share a row.

A program, by its ticket, reads one part of some rows and adds it to their ranges; then it waits for the ranges of a part that came
LAG parts before, and quantizes that one, which the GPU's cache may still hold. It waits for lower tickets only, and who has one
has begun, so that nobody waits for ever (as in Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back",
2016).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from granq_plugin.kernels.triton_launch import Launch
from granq_plugin.kernels.triton_math import _ends, _norms_of, _places, _quantize, _ranges_of, _values, _wider

__all__ = ["launch"]

_TILE = 4096  # values of a part
_LAG = 2**20  # values between reading a part and quantizing it; at least the parts of a row


@triton.jit
def _key(x):
    """Integers in the order of the values; a NaN is beyond all of them, on the side of its sign. 0, from which maxima begin, is
    below all values."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _value(key):
    return tl.where(key >= 0x80000000, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _part(
        unit, x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, row_stride, sample_stride, step, n,
        tiles, parts, low, high, above, below, nan_passes, NORM: tl.constexpr, CLAMP: tl.constexpr, EVEN: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Values of a part, where their gradients pass, where they are, which are there, their rows, and which of those are there."""
    sample = unit // parts // tiles
    first = unit // parts % tiles * ROWS
    channel = first + tl.arange(0, ROWS)
    place = unit % parts * BLOCK + tl.arange(0, BLOCK)
    address, inside = _places(channel, place, channels, row_stride, step, n, EVEN)
    address = sample.to(tl.int64) * sample_stride + address
    alpha, beta = _norms_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, first, channels, NORM, ROWS)
    x, passes = _values(
        x_ptr, residual_ptr, address, inside, alpha[:, None], beta[:, None], low, high, above, below, nan_passes, NORM, CLAMP)
    return x, passes, address, inside, sample * channels + channel, channel < channels


@triton.jit
def _granq_split(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, most_ptr,
        negated_ptr, done_ptr, ticket_ptr, eps, channels, row_stride, sample_stride, step, n, tiles, half_levels, overflow,
        smallest, low, high, above, below, largest, nan_passes, parts, units, lag, NORM: tl.constexpr, CLAMP: tl.constexpr,
        MASK: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    if ticket < units:
        x, passes, address, inside, row, exists = _part(
            ticket, x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, row_stride, sample_stride, step, n,
            tiles, parts, low, high, above, below, nan_passes, NORM, CLAMP, EVEN, ROWS, BLOCK)
        if MASK:
            tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
        lo, hi = tl.reduce(_ends(x, inside, EVEN), 1, _wider)
        tl.atomic_max(most_ptr + row, _key(hi), mask=exists, sem="relaxed")
        tl.atomic_max(negated_ptr + row, _key(-lo), mask=exists, sem="relaxed")
        tl.debug_barrier()  # all threads' ranges before the count
        tl.atomic_add(done_ptr + ticket // parts, 1, sem="release")
    unit = ticket - lag
    if unit >= 0:
        while tl.atomic_add(done_ptr + unit // parts, 0, sem="acquire") < parts:  # a load that sees the ranges before the count
            pass
        x, passes, address, inside, row, exists = _part(
            unit, x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, row_stride, sample_stride, step, n,
            tiles, parts, low, high, above, below, nan_passes, NORM, CLAMP, EVEN, ROWS, BLOCK)
        lo = -_value(tl.load(negated_ptr + row, mask=exists, other=0, cache_modifier=".cg"))
        hi = _value(tl.load(most_ptr + row, mask=exists, other=0, cache_modifier=".cg"))
        scale, inv_scale, offset, fast = _ranges_of(lo, hi, exists, half_levels, overflow, smallest, FAST)
        if unit % parts == 0:
            tl.store(scale_ptr + row, scale, mask=exists)
            tl.store(zero_point_ptr + row, 0.0 - offset, mask=exists)
        _quantize(
            y_ptr, address, inside, x, scale[:, None], inv_scale[:, None], offset[:, None], fast, largest, NARROW)


def launch(samples: int, geometry: tuple, eps: float, numbers: tuple, constants: dict) -> Callable[..., None]:
    """Its tensors, ``numbers`` and ``constants`` are those of ``triton_kernel._granq``; ``geometry`` is ``channels, row_stride,
    sample_stride, step, n``."""
    channels, row_stride, *_, n = geometry
    is_contiguous = row_stride > 1
    rows = 1 if is_contiguous else min(64 if channels > 64 else 32, triton.next_power_of_2(channels))
    block = _TILE // rows
    parts, tiles = triton.cdiv(n, block), triton.cdiv(channels, rows)
    groups, count = samples * tiles, samples * channels
    units = groups * parts
    lag = max(parts, min(units, _LAG // _TILE))
    one = Launch(_granq_split, (units + lag, ), (eps, *geometry, tiles, *numbers, parts, units, lag), constants | dict(
        EVEN=n % block == 0 and channels % rows == 0, ROWS=rows, BLOCK=block, num_warps=4))

    def launched(x: Tensor, *others: Tensor) -> None:
        shared = x.new_zeros(2 * count + groups + 1, dtype=torch.int32)
        most, negated, done, ticket = shared.split([count, count, groups, 1])
        one(x, *others, most.view(torch.uint32), negated.view(torch.uint32), done, ticket)
    return launched
