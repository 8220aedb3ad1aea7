"""What the Triton kernels do to values: bit for bit what torch's operations do, but for the sign of zeros.

Divisions round correctly, multiplications and additions are not fused, rounding is to even. A BatchNorm ahead is one fused
multiplication and addition, as on the CPU; cuDNN's may differ from it in the last places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from granq_plugin.functional import MIN_RANGE
from granq_plugin.kernels.layout import Ahead, Before

__all__ = ["clamp_kind", "level_arguments", "norm_arguments"]

_ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=_ALL_NAN)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=_ALL_NAN)


@triton.jit
def _wider(lo, hi, other_lo, other_hi):
    """Of two ranges, the one that has both."""
    return _least(lo, other_lo), _largest(hi, other_hi)


@triton.jit
def _round(x):
    """To the nearest integer, half to even: adding 2^23 leaves no fraction. Values beyond are integers already."""
    magnitude = tl.abs(x)
    rounded = (magnitude + 8388608.0) - 8388608.0
    return tl.where(magnitude < 8388608.0, tl.where(x < 0, -rounded, rounded), x)


@triton.jit
def _before(x, low, high, above, below, nan_passes, CLAMP: tl.constexpr):
    """ReLU (CLAMP 1) or any clamp (2) of x, and where the gradient passes."""
    passes = tl.full(x.shape, 1, tl.int32)
    if CLAMP == 1:
        passes = tl.where(x <= 0.0, 0, 1)
        x = _largest(x, 0.0)
    if CLAMP == 2:
        passes = tl.where(x <= above, 0, 1) * tl.where(x >= below, 0, 1) * tl.where(x == x, 1, nan_passes)
        x = _least(_largest(x, low), high)
    return x, passes


@triton.jit
def _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, NORM: tl.constexpr):
    """A BatchNorm in evaluation mode, if there is one (NORM), as factors and shifts of channels."""
    alpha = tl.full(channel.shape, 1.0, tl.float32)
    beta = tl.full(channel.shape, 0.0, tl.float32)
    if NORM > 0:
        alpha = tl.div_rn(alpha, tl.sqrt_rn(tl.load(var_ptr + channel) + eps))
        alpha *= tl.load(weight_ptr + channel)
        beta = tl.fma(-tl.load(mean_ptr + channel), alpha, tl.load(bias_ptr + channel))
    return alpha, beta


@triton.jit
def _own_rows(ROWS: tl.constexpr):
    """Which of ROWS rows, four or more, a thread computes something of; all of them are computed in every 32 threads, or in all."""
    return tl.arange(0, 32 if ROWS < 32 else ROWS) % ROWS


@triton.jit
def _of_all(value, ROWS: tl.constexpr):
    """What others have computed of the rows that a thread needs."""
    return tl.gather(value, tl.arange(0, ROWS), 0)


@triton.jit
def _norms_of(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, first, channels, NORM: tl.constexpr, ROWS: tl.constexpr):
    """The same of ROWS channels, from the first on, of which each thread needs several."""
    if (NORM == 0) | (ROWS < 4):
        alpha, beta = _norm_of(
            mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, tl.minimum(first + tl.arange(0, ROWS), channels - 1), NORM)
    else:
        alpha, beta = _norm_of(
            mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, tl.minimum(first + _own_rows(ROWS), channels - 1), NORM)
        alpha = _of_all(alpha, ROWS)
        beta = _of_all(beta, ROWS)
    return alpha, beta


@triton.jit
def _stored(y, dtype: tl.constexpr):
    """y in the dtype of the output, rounded to nearest even: a GPU's conversion to bfloat16 does that too, the interpreter's cuts
    off."""
    if dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(y == y, rounded.to(tl.float32, bitcast=True), y)
    return y.to(dtype)


@triton.jit
def _values(
        x_ptr, residual_ptr, address, inside, alpha, beta, low, high, above, below, nan_passes, NORM: tl.constexpr,
        CLAMP: tl.constexpr):
    """Values as they are when they are quantized, and where the gradient passes: after a BatchNorm (NORM 1), and an addition (2),
    each rounded to the dtype of x, and what comes before (CLAMP)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)
    if NORM > 0:
        x = _stored(tl.fma(x, tl.broadcast_to(alpha, x.shape), tl.broadcast_to(beta, x.shape)), dtype).to(tl.float32)
    if NORM == 2:
        x += tl.load(residual_ptr + address, mask=inside, other=0.0).to(tl.float32)
        x = _stored(x, dtype).to(tl.float32)
    return _before(x, low, high, above, below, nan_passes, CLAMP)


@triton.jit
def _places(channel, place, channels, row_stride, step, n, EVEN: tl.constexpr):
    """Addresses ``[channel, place]``, and which of them are there: all, if channels and places fill their blocks."""
    address = (channel * row_stride)[:, None] + (place * step)[None, :]
    if EVEN:
        inside = tl.full(address.shape, 1, tl.int1)
    else:
        inside = (channel < channels)[:, None] & (place < n)[None, :]
    return address, inside


@triton.jit
def _ends(x, inside, EVEN: tl.constexpr):
    """x twice, to find the least and the largest value that is there."""
    least = x
    most = x
    if not EVEN:
        least = tl.where(inside, x, float("inf"))
        most = tl.where(inside, x, float("-inf"))
    return least, most


@triton.jit
def _range_of(lo, hi, half_levels, overflow, smallest, FAST: tl.constexpr):
    """Scales of rows, their inverses, offsets, and whether :func:`_on_grid_fast` may be used for all; see
    functional.inverse_scale."""
    half = hi * 0.5 - lo * 0.5
    half = tl.where(half < smallest, smallest, half)
    magnitude = tl.where(hi > -lo, hi, -lo) * overflow
    divisor = tl.where(magnitude > half, magnitude, half)
    one = tl.full(lo.shape, 1.0, tl.float32)
    inv_scale = tl.div_rn(one, divisor) * half_levels
    offset = _round(inv_scale * lo)
    moderate = (inv_scale > 1e-15) & (inv_scale < 1e15) & (tl.abs(offset) < 2097152.0)  # not for NaN
    fast = tl.min(tl.where(moderate, FAST, 0), axis=0) == 1
    return tl.div_rn(one, inv_scale), inv_scale, offset, fast


@triton.jit
def _ranges_of(lo, hi, exists, half_levels, overflow, smallest, FAST: tl.constexpr):
    """The same of rows of which each thread needs several, and many need the same: every thread computes that of one, and they
    tell each other. Rows that are not there have the range 0, which is moderate."""
    ROWS: tl.constexpr = lo.shape[0]
    lo = tl.where(exists, lo, 0.0)
    hi = tl.where(exists, hi, 0.0)
    if ROWS < 4:
        scale, inv_scale, offset, fast = _range_of(lo, hi, half_levels, overflow, smallest, FAST)
    else:
        own = _own_rows(ROWS)
        scale, inv_scale, offset, fast = _range_of(
            tl.gather(lo, own, 0), tl.gather(hi, own, 0), half_levels, overflow, smallest, FAST)
        scale = _of_all(scale, ROWS)
        inv_scale = _of_all(inv_scale, ROWS)
        offset = _of_all(offset, ROWS)
    return scale, inv_scale, offset, fast


@triton.jit
def _on_grid(x, inv_scale, offset):
    return tl.div_rn(_round(x * inv_scale - offset) + offset, tl.broadcast_to(inv_scale, x.shape))


@triton.jit
def _on_grid_fast(x, inv_scale, offset, scale):
    """The same of moderate values, without branches: adding 1.5 * 2^23 rounds, and subtracting an integer of that size is exact. A
    quotient that is corrected by its exact remainder, with the correctly rounded reciprocal, is the correctly rounded one
    (Markstein 1990)."""
    y = ((x * inv_scale - offset) + 12582912.0) - (12582912.0 - offset)
    negated = tl.broadcast_to(-inv_scale, x.shape)
    reciprocal = tl.broadcast_to(scale, x.shape)
    q = y * reciprocal
    q = tl.fma(tl.fma(q, negated, y), reciprocal, q)
    return tl.fma(tl.fma(q, negated, y), reciprocal, q)


@triton.jit
def _quantize(y_ptr, address, inside, x, scale, inv_scale, offset, fast, largest, NARROW: tl.constexpr):
    """Stores x on the grids of its ranges, with which it can be broadcast."""
    if fast:
        y = _on_grid_fast(x, inv_scale, offset, scale)
    else:
        y = _on_grid(x, inv_scale, offset)
    if NARROW:
        y = _least(_largest(y, -largest), largest)
    tl.store(y_ptr + address, _stored(y, y_ptr.dtype.element_ty), mask=inside)


def clamp_kind(before: Before) -> int:
    """What the kernels do before they quantize: 0 nothing, 1 a ReLU, 2 a clamp."""
    return 1 if before == Before(relu=True) else 2 if before != Before() else 0


def norm_arguments(x: Tensor, ahead: Ahead | None) -> tuple[int, tuple[Tensor, ...], float]:
    """NORM of the kernels, their arguments from mean_ptr to residual_ptr, and eps."""
    if ahead is None:
        return 0, (x, x, x, x, x), 0.0
    weight, bias = (t if t is not None else torch.full_like(ahead.mean, v) for t, v in ((ahead.weight, 1.0), (ahead.bias, 0.0)))
    residual = x if ahead.residual is None else ahead.residual
    return 1 if ahead.residual is None else 2, (ahead.mean, ahead.var, weight, bias, residual), ahead.eps


def level_arguments(bit_width: int) -> tuple[float, float, float]:
    """``half_levels, overflow, smallest`` of :func:`_range_of`."""
    levels = 2**bit_width - 1
    return levels / 2, levels / torch.finfo(torch.float32).max, MIN_RANGE / 2
