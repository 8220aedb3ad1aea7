"""The dynamic quantizer on GPU for rows that are too long for one program: programs share a row. There are two ways:

- *kept*: a program goes from part to part of some rows: it adds one to their ranges, waits for those of the part before, and
  quantizes that one, which it has kept, while the next ones are on their way. Memory is read once. All programs should run at a
  time; who waits too long, since others have not begun, finds the ranges alone, so that nobody waits for ever.
- *read twice*: a program, by its ticket, adds one part to the ranges; then it waits for the ranges of a part that came LAG parts
  before, and quantizes that one, which the GPU's cache may still hold. It waits for lower tickets only, and who has one has begun
  (as in Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016).

Both have the same bits. Which one is faster depends on the GPU, and is measured there, at first.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from granq_plugin.kernels.triton_launch import Launch
from granq_plugin.kernels.triton_math import _ends, _norms_of, _places, _quantize, _ranges_of, _values, _wider

__all__ = ["PATIENCE", "launches", "tile", "together"]

_TILE = 4096  # values of a part
_LAG = 2**20  # values between reading a part and quantizing it; at least the parts of a row
_STAGES, _WARPS, _REGISTERS, _TOGETHER = 3, 4, 128, 4  # of kept parts: loads, and programs of a multiprocessor
PATIENCE = 2**12  # looks at a count, some milliseconds of a GPU


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
        unit, there, channels, row_stride, sample_stride, step, n, tiles, parts, EVEN: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr):
    """Where the values of a part are, and which are there; its first channel, its rows, and which of those are there."""
    sample = unit // parts // tiles
    first = unit // parts % tiles * ROWS
    channel = first + tl.arange(0, ROWS)
    address, inside = _places(channel, unit % parts * BLOCK + tl.arange(0, BLOCK), channels, row_stride, step, n, EVEN)
    address = sample.to(tl.int64) * sample_stride + address
    return address, inside & there, first, sample * channels + channel, (channel < channels) & there


@triton.jit
def _of_part(
        x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, address, inside, first, channels, low, high, above,
        below, nan_passes, NORM: tl.constexpr, CLAMP: tl.constexpr, ROWS: tl.constexpr):
    """Values of a part, and where their gradients pass."""
    alpha, beta = _norms_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, first, channels, NORM, ROWS)
    return _values(
        x_ptr, residual_ptr, address, inside, alpha[:, None], beta[:, None], low, high, above, below, nan_passes, NORM, CLAMP)


@triton.jit
def _add_range(most_ptr, negated_ptr, x, inside, row, exists, EVEN: tl.constexpr):
    lo, hi = tl.reduce(_ends(x, inside, EVEN), 1, _wider)
    tl.atomic_max(most_ptr + row, _key(hi), mask=exists, sem="relaxed")
    tl.atomic_max(negated_ptr + row, _key(-lo), mask=exists, sem="relaxed")


@triton.jit
def _range(most_ptr, negated_ptr, row, exists):
    """What programs have added; not from a cache of this one's."""
    lo = -_value(tl.load(negated_ptr + row, mask=exists, other=0, cache_modifier=".cg"))
    hi = _value(tl.load(most_ptr + row, mask=exists, other=0, cache_modifier=".cg"))
    return lo, hi


@triton.jit
def _range_alone(
        x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, address, first, channels, row_stride, step, n, low, high,
        above, below, nan_passes, NORM: tl.constexpr, CLAMP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same, found by reading whole rows; address: of the sample."""
    lo = tl.full([ROWS], float("inf"), tl.float32)
    hi = tl.full([ROWS], float("-inf"), tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=1):
        offset, inside = _places(
            first + tl.arange(0, ROWS), start + tl.arange(0, BLOCK), channels, row_stride, step, n, False)
        x, _ = _of_part(
            x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, address + offset, inside, first, channels, low, high,
            above, below, nan_passes, NORM, CLAMP, ROWS)
        least, most = tl.reduce(_ends(x, inside, False), 1, _wider)
        lo, hi = _wider(lo, hi, least, most)
    return lo, hi


@triton.jit
def _finish(
        y_ptr, scale_ptr, zero_point_ptr, x, address, inside, row, exists, lo, hi, first_part, half_levels, overflow, smallest,
        largest, NARROW: tl.constexpr, FAST: tl.constexpr):
    """Quantizes a part; the first one of its rows says what their scales are."""
    scale, inv_scale, offset, fast = _ranges_of(lo, hi, exists, half_levels, overflow, smallest, FAST)
    if first_part:
        tl.store(scale_ptr + row, scale, mask=exists)
        tl.store(zero_point_ptr + row, 0.0 - offset, mask=exists)
    _quantize(y_ptr, address, inside, x, scale[:, None], inv_scale[:, None], offset[:, None], fast, largest, NARROW)


@triton.jit
def _granq_kept(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, most_ptr,
        negated_ptr, done_ptr, eps, channels, row_stride, sample_stride, step, n, tiles, half_levels, overflow, smallest, low, high,
        above, below, largest, nan_passes, parts, units, programs, patience, NORM: tl.constexpr, CLAMP: tl.constexpr,
        MASK: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
        STAGES: tl.constexpr):
    kept, left = tl.full([ROWS, BLOCK], 0.0, tl.float32), tl.full([], patience, tl.int32)
    for unit in tl.range(tl.program_id(0), units + programs, programs, num_stages=STAGES):
        address, inside, first, row, exists = _part(
            unit, unit < units, channels, row_stride, sample_stride, step, n, tiles, parts, EVEN, ROWS, BLOCK)
        x, passes = _of_part(
            x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, address, inside, first, channels, low, high, above,
            below, nan_passes, NORM, CLAMP, ROWS)
        if unit < units:
            if MASK:
                tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
            _add_range(most_ptr, negated_ptr, x, inside, row, exists, EVEN)
        # What a thread has looked up here, the others are told behind a barrier: all have added their ranges before the count. It
        # waits for counts of lower units, as parts <= programs. A barrier in the loop itself, or a loop, would keep loads from
        # being on their way.
        before, looks = unit - programs, 0
        wanted = tl.where(before < 0, 0, parts)
        if units > 0:
            while (tl.atomic_add(done_ptr + tl.maximum(before, 0) // parts, 0, sem="acquire") < wanted) & (looks < left):
                looks += 1
        if unit < units:
            tl.atomic_add(done_ptr + unit // parts, 1, sem="release")
        if before >= 0:
            address, inside, first, row, exists = _part(
                before, True, channels, row_stride, sample_stride, step, n, tiles, parts, EVEN, ROWS, BLOCK)
            lo, hi = _range(most_ptr, negated_ptr, row, exists)
            if looks == left:
                lo, hi = _range_alone(
                    x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps,
                    (before // parts // tiles).to(tl.int64) * sample_stride, first, channels, row_stride, step, n, low, high, above,
                    below, nan_passes, NORM, CLAMP, ROWS, BLOCK // 8 if BLOCK > 8 else 1)
                left = left // 8 + 1  # the next parts will hardly do better
            _finish(
                y_ptr, scale_ptr, zero_point_ptr, kept, address, inside, row, exists, lo, hi, before % parts == 0, half_levels,
                overflow, smallest, largest, NARROW, FAST)
        kept = x


@triton.jit
def _granq_split(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, most_ptr,
        negated_ptr, done_ptr, ticket_ptr, eps, channels, row_stride, sample_stride, step, n, tiles, half_levels, overflow,
        smallest, low, high, above, below, largest, nan_passes, parts, units, lag, NORM: tl.constexpr, CLAMP: tl.constexpr,
        MASK: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    if ticket < units:
        address, inside, first, row, exists = _part(
            ticket, True, channels, row_stride, sample_stride, step, n, tiles, parts, EVEN, ROWS, BLOCK)
        x, passes = _of_part(
            x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, address, inside, first, channels, low, high, above,
            below, nan_passes, NORM, CLAMP, ROWS)
        if MASK:
            tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
        _add_range(most_ptr, negated_ptr, x, inside, row, exists, EVEN)
        tl.debug_barrier()  # all threads' ranges before the count
        tl.atomic_add(done_ptr + ticket // parts, 1, sem="release")
    unit = ticket - lag
    if unit >= 0:
        while tl.atomic_add(done_ptr + unit // parts, 0, sem="acquire") < parts:  # a load that sees the ranges before the count
            pass
        address, inside, first, row, exists = _part(
            unit, True, channels, row_stride, sample_stride, step, n, tiles, parts, EVEN, ROWS, BLOCK)
        x, passes = _of_part(
            x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, address, inside, first, channels, low, high, above,
            below, nan_passes, NORM, CLAMP, ROWS)
        lo, hi = _range(most_ptr, negated_ptr, row, exists)
        _finish(
            y_ptr, scale_ptr, zero_point_ptr, x, address, inside, row, exists, lo, hi, unit % parts == 0, half_levels, overflow,
            smallest, largest, NARROW, FAST)


def together(value_bytes: int, shared_memory: int) -> int:
    """Programs of kept parts that a multiprocessor runs at a time, with shared_memory bytes for one of them at most; value_bytes:
    what is loaded for each value."""
    needed = (_STAGES - 1) * _TILE * value_bytes + 2**12 + 2**9 + 2**10  # for reductions; what CUDA takes of a program
    return min(_TOGETHER, (shared_memory + 2**10) // needed)


def tile(channels: int, n: int, is_contiguous: bool) -> tuple[int, int, int]:
    """Rows of a part, places of each, and parts of a row."""
    rows = 1 if is_contiguous else min(64 if channels > 64 else 32, triton.next_power_of_2(channels))
    block = _TILE // rows
    return rows, block, triton.cdiv(n, block)


def launches(
        samples: int, geometry: tuple, eps: float, numbers: tuple, constants: dict, programs: int, *,
        patience: int) -> list[Callable[..., None]]:
    """The way that reads twice, and the one that keeps parts, where it can.

    Their tensors, ``numbers`` and ``constants`` are those of ``triton_kernel._granq``; ``geometry`` is ``channels, row_stride,
    sample_stride, step, n``; ``programs``: that keep parts and run at a time, 0 where there is no way to keep them;
    ``patience``: how often they look at a count.
    """
    channels, row_stride, *_, n = geometry
    rows, block, parts = tile(channels, n, row_stride > 1)
    tiles = triton.cdiv(channels, rows)
    groups, count = samples * tiles, samples * channels
    units = groups * parts
    lag = max(parts, min(units, _LAG // _TILE))
    numbers = eps, *geometry, tiles, *numbers, parts, units
    constants = constants | dict(EVEN=n % block == 0 and channels % rows == 0, ROWS=rows, BLOCK=block, num_warps=_WARPS)

    def counting(launch: Launch, *counts: int) -> Callable[..., None]:
        """The same of the other tensors: ranges and counts begin at zero."""
        def launched(x: Tensor, *others: Tensor) -> None:
            most, negated, *rest = x.new_zeros(2 * count + sum(counts), dtype=torch.int32).split([count, count, *counts])
            launch(x, *others, most.view(torch.uint32), negated.view(torch.uint32), *rest)
        return launched

    read_twice = counting(Launch(_granq_split, (units + lag, ), (*numbers, lag), constants), groups, 1)
    if parts > programs:  # a program would wait for parts that it is to read later
        return [read_twice]
    programs = min(programs, units)
    return [read_twice, counting(Launch(_granq_kept, (programs, ), (*numbers, programs, patience), constants | dict(
        STAGES=_STAGES, num_stages=_STAGES, maxnreg=_REGISTERS)), groups)]
