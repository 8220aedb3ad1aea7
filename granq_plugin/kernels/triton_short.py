"""The dynamic quantizer on GPU for short rows that begin anywhere, as those of 7x7 and 14x14 values do.

Memory is read and written as a vector, as wide as it goes; between the two a thread has a row, or a good part of one, to find its
range, and a table of ranges says what a value's is.
"""

import triton
import triton.language as tl

from granq_plugin.kernels.triton_launch import Launch
from granq_plugin.kernels.triton_math import _norm_of, _quantize, _range_of, _values, _wider

__all__ = ["launch", "suits"]

_LONGEST = 512
_TILE = 2048  # places of a program


@triton.jit
def _granq_short(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, eps, channels,
        rows, half_levels, overflow, smallest, low, high, above, below, largest, nan_passes, NORM: tl.constexpr,
        CLAMP: tl.constexpr, MASK: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    exists = row < rows
    place = tl.arange(0, ROWS * BLOCK)
    of_row = tl.minimum(place // N, ROWS - 1)
    address = first.to(tl.int64) * N + place
    if EVEN:
        inside = place < ROWS * N
    else:
        inside = place < tl.minimum(ROWS, rows - first) * N
    alpha, beta = _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, row % channels, NORM)
    x, passes = _values(
        x_ptr, residual_ptr, address, inside, tl.gather(alpha, of_row, 0), tl.gather(beta, of_row, 0), low, high, above, below,
        nan_passes, NORM, CLAMP)
    if MASK:
        tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
    # the last value of a row stands for the places beyond it
    of_place = tl.minimum(tl.arange(0, BLOCK), N - 1)[:, None] + (tl.arange(0, ROWS) * N)[None, :]
    by_row = tl.reshape(tl.gather(x, tl.reshape(of_place, [BLOCK * ROWS]), 0), [BLOCK, ROWS])
    lo, hi = tl.reduce((by_row, by_row), 0, _wider)
    lo = tl.where(exists, lo, 0.0)  # a range that is moderate
    hi = tl.where(exists, hi, 0.0)
    scale, inv_scale, offset, fast = _range_of(lo, hi, half_levels, overflow, smallest, FAST)
    tl.store(scale_ptr + row, scale, mask=exists)
    tl.store(zero_point_ptr + row, 0.0 - offset, mask=exists)
    _quantize(
        y_ptr, address, inside, x, tl.gather(scale, of_row, 0), tl.gather(inv_scale, of_row, 0), tl.gather(offset, of_row, 0), fast,
        largest, NARROW)


def suits(n: int) -> bool:
    """Whether rows of n values, one after the other, are for this kernel: others begin where wide loads may."""
    return 1 < n <= _LONGEST and n % 16 != 0


def launch(samples: int, channels: int, n: int, eps: float, numbers: tuple, constants: dict) -> Launch:
    """For contiguous rows; its tensors, ``numbers`` and ``constants`` are those of ``triton_kernel._granq``."""
    block = triton.next_power_of_2(n)
    count = samples * channels
    rows = min(_TILE // block, triton.next_power_of_2(count))
    return Launch(_granq_short, (triton.cdiv(count, rows), ), (eps, channels, count, *numbers), constants | dict(
        EVEN=count % rows == 0, N=n, ROWS=rows, BLOCK=block, num_warps=2))
