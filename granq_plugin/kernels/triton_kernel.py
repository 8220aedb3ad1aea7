"""The dynamic quantizer on GPU, in Triton. A row stays on chip up to ``LONGEST_ROW`` values; a longer one is read twice.

Imported where there is a GPU, or where ``GRANQ_KERNEL=triton`` asks for it: with ``TRITON_INTERPRET=1`` it runs on CPU tensors.
Results are those of :func:`granq_plugin.functional.granq` bit for bit, but for the sign of zeros: divisions round correctly,
multiplications and additions are not fused, and rounding is to even. A BatchNorm ahead is one fused multiplication and addition,
as on the CPU; cuDNN's may differ from it in the last places.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from granq_plugin.functional import MIN_RANGE, GranQResult
from granq_plugin.kernels import gradients
from granq_plugin.kernels.layout import Ahead, Before, Layout

__all__ = ["LONGEST_ROW", "granq", "reads"]

LONGEST_ROW = 16384
_TILE = 512  # values of a program, where rows are short
_ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=_ALL_NAN)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=_ALL_NAN)


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
def _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel):
    """A BatchNorm in evaluation mode as factors and shifts of channels."""
    alpha = tl.div_rn(tl.full(channel.shape, 1.0, tl.float32), tl.sqrt_rn(tl.load(var_ptr + channel) + eps))
    alpha *= tl.load(weight_ptr + channel)
    return alpha, tl.fma(-tl.load(mean_ptr + channel), alpha, tl.load(bias_ptr + channel))


@triton.jit
def _load(x_ptr, residual_ptr, address, inside, other: tl.constexpr, alpha, beta, NORM: tl.constexpr):
    """Values as they are when they are clamped: after a BatchNorm (NORM 1), and an addition (2). What is not there is anything."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + address, mask=inside, other=other).to(tl.float32)
    if NORM > 0:
        zeros = tl.zeros(x.shape, tl.float32)
        x = _stored(tl.fma(x, alpha + zeros, beta + zeros), dtype).to(tl.float32)
    if NORM == 2:
        x += tl.load(residual_ptr + address, mask=inside, other=0.0).to(tl.float32)
        x = _stored(x, dtype).to(tl.float32)
    return x


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
def _on_grid(x, inv_scale, offset):
    return tl.div_rn(_round(x * inv_scale - offset) + offset, inv_scale + tl.zeros(x.shape, tl.float32))


@triton.jit
def _on_grid_fast(x, inv_scale, offset, scale):
    """The same of moderate values, without branches: adding and subtracting 1.5 * 2^23 rounds, and a quotient that is corrected by
    its exact remainder, with the correctly rounded reciprocal, is the correctly rounded one (Markstein 1990)."""
    y = ((x * inv_scale - offset) + 12582912.0) - 12582912.0 + offset
    divisor = inv_scale + tl.zeros(x.shape, tl.float32)
    reciprocal = scale + tl.zeros(x.shape, tl.float32)
    q = y * reciprocal
    q = tl.fma(tl.fma(-q, divisor, y), reciprocal, q)
    return tl.fma(tl.fma(-q, divisor, y), reciprocal, q)


@triton.jit
def _quantized(x, inv_scale, offset, scale, fast, largest, NARROW: tl.constexpr):
    if fast:
        y = _on_grid_fast(x, inv_scale[:, None], offset[:, None], scale[:, None])
    else:
        y = _on_grid(x, inv_scale[:, None], offset[:, None])
    if NARROW:
        y = _least(_largest(y, -largest), largest)
    return y


@triton.jit
def _places(row, exists, at, step, n, EVEN: tl.constexpr):
    """Addresses of a block, and which of them are there: all of them, if rows and channels fill their blocks."""
    address = row[:, None] + (at * step)[None, :]
    if EVEN:
        inside = tl.full(address.shape, 1, tl.int1)
    else:
        inside = exists[:, None] & (at < n)[None, :]
    return address, inside


@triton.jit
def _first_pass(
        x_ptr, residual_ptr, mask_ptr, address, inside, alpha, beta, low, high, above, below, nan_passes, NORM: tl.constexpr,
        CLAMP: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr):
    """Values, and what is least and largest where there are any."""
    x = _load(x_ptr, residual_ptr, address, inside, float("inf"), alpha, beta, NORM)
    x, passes = _before(x, low, high, above, below, nan_passes, CLAMP)
    if MASK:
        tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
    least = x
    most = x
    if not EVEN:
        if NORM > 0:
            least = tl.where(inside, x, float("inf"))
        most = tl.where(inside, x, float("-inf"))
    return x, least, most


@triton.jit
def _granq(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, eps, channels,
        row_stride, sample_stride, step, n, tiles, half_levels, overflow, smallest, low, high, above, below, largest, nan_passes,
        NORM: tl.constexpr, CLAMP: tl.constexpr, MASK: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    sample = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    exists = channel < channels
    x_ptr += sample.to(tl.int64) * sample_stride
    y_ptr += sample.to(tl.int64) * sample_stride
    mask_ptr += sample.to(tl.int64) * sample_stride
    residual_ptr += sample.to(tl.int64) * sample_stride
    alpha = tl.full([ROWS], 1.0, tl.float32)
    beta = tl.full([ROWS], 0.0, tl.float32)
    if NORM > 0:
        alpha, beta = _norm_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, tl.minimum(channel, channels - 1))
    alpha = alpha[:, None]
    beta = beta[:, None]
    row = channel * row_stride
    place = tl.arange(0, BLOCK)
    address, inside = _places(row, exists, place, step, n, EVEN)
    x, least, most = _first_pass(
        x_ptr, residual_ptr, mask_ptr, address, inside, alpha, beta, low, high, above, below, nan_passes, NORM, CLAMP, MASK, EVEN)
    if not ONE_BLOCK:
        for start in range(BLOCK, n, BLOCK):
            address, inside = _places(row, exists, start + place, step, n, EVEN)
            _, x_least, x_most = _first_pass(
                x_ptr, residual_ptr, mask_ptr, address, inside, alpha, beta, low, high, above, below, nan_passes, NORM, CLAMP,
                MASK, EVEN)
            least, most = _least(least, x_least), _largest(most, x_most)
    lo = tl.reduce(least, 1, _least)
    hi = tl.reduce(most, 1, _largest)
    # functional.inverse_scale
    half = hi * 0.5 - lo * 0.5
    half = tl.where(half < smallest, smallest, half)
    magnitude = tl.where(hi > -lo, hi, -lo) * overflow
    divisor = tl.where(magnitude > half, magnitude, half)
    one = tl.full([ROWS], 1.0, tl.float32)
    inv_scale = tl.div_rn(one, divisor) * half_levels
    offset = _round(inv_scale * lo)
    scale = tl.div_rn(one, inv_scale)
    tl.store(scale_ptr + sample * channels + channel, scale, mask=exists)
    tl.store(zero_point_ptr + sample * channels + channel, 0.0 - offset, mask=exists)
    moderate = (inv_scale > 1e-15) & (inv_scale < 1e15) & (tl.abs(offset) < 2097152.0)  # not for NaN
    fast = tl.min(tl.where(moderate | (channel >= channels), FAST, 0), axis=0) == 1
    if ONE_BLOCK:
        y = _quantized(x, inv_scale, offset, scale, fast, largest, NARROW)
        tl.store(y_ptr + address, _stored(y, y_ptr.dtype.element_ty), mask=inside)
    else:
        for start in range(0, n, BLOCK):
            address, inside = _places(row, exists, start + place, step, n, EVEN)
            x = _load(x_ptr, residual_ptr, address, inside, 0.0, alpha, beta, NORM)
            x, _ = _before(x, low, high, above, below, nan_passes, CLAMP)
            y = _quantized(x, inv_scale, offset, scale, fast, largest, NARROW)
            tl.store(y_ptr + address, _stored(y, y_ptr.dtype.element_ty), mask=inside)


def clamp_kind(before: Before) -> int:
    """What the kernels do before they quantize: 0 nothing, 1 a ReLU, 2 a clamp."""
    return 1 if before == Before(relu=True) else 2 if before != Before() else 0


def _tile(layout: Layout, item_size: int) -> tuple[int, int, int]:
    """``(rows, values of a row, warps)`` of a program: contiguous, what was fastest on an H100."""
    n, channels = layout.outer * layout.inner, triton.next_power_of_2(layout.channels)
    block = triton.next_power_of_2(n)
    if layout.inner == 1 and layout.outer > 1:  # channels_last: sectors of 32 bytes or more of neighbouring channels
        rows = next((r for r in (32, 16, 8) if r * block <= LONGEST_ROW), 8)
        if rows * item_size < 32 or rows * block > 2 * LONGEST_ROW:  # read twice
            rows, block = 32, _TILE // 4
        rows = min(rows, channels)
        values = rows * block
        return rows, block, max(1, values // 1024 if values <= 8 * _TILE else min(32, values // 512))
    block = block if n <= LONGEST_ROW else LONGEST_ROW // 2
    rows = min(max(1, _TILE // block), channels)
    return rows, block, max(1, min(16, rows * block // 512))


def reads(layout: Layout, item_size: int) -> int:
    """How often the kernel reads every value: 1 where a row stays on chip, 2 where it does not."""
    return 1 if layout.outer * layout.inner <= _tile(layout, item_size)[1] else 2


def norm_arguments(x: Tensor, ahead: Ahead | None) -> tuple[int, tuple]:
    """NORM of the kernels, and their arguments from mean_ptr to eps."""
    if ahead is None:
        return 0, (x, ) * 5 + (0.0, )
    weight, bias = (t if t is not None else torch.full_like(ahead.mean, v) for t, v in ((ahead.weight, 1.0), (ahead.bias, 0.0)))
    residual = x if ahead.residual is None else ahead.residual
    return 1 if ahead.residual is None else 2, (ahead.mean, ahead.var, weight, bias, residual, ahead.eps)


def _forward(x: Tensor, bit_width: int, layout: Layout, before: Before, ahead: Ahead | None, needs_mask: bool):
    samples, outer, channels, inner = layout[:4]
    y = torch.empty_like(x)
    mask = torch.empty_like(x, dtype=torch.bool) if needs_mask else None
    scale, zero_point = (torch.empty(layout.scale_shape, dtype=torch.float32, device=x.device) for _ in range(2))
    n = outer * inner
    rows, block, warps = _tile(layout, x.element_size())
    tiles = triton.cdiv(channels, rows)
    levels, largest = 2**bit_width - 1, torch.finfo(torch.float32).max
    _, *limits, nan_passes = before.limits(x.dtype)
    norm, norms = norm_arguments(x, ahead)
    _granq[(samples * tiles, )](
        x, y, mask.view(torch.int8) if needs_mask else x, scale, zero_point, *norms, channels, inner, outer * channels * inner,
        channels if inner == 1 and outer > 1 else 1, n, tiles, levels / 2, levels / largest, MIN_RANGE / 2, *limits,
        torch.finfo(x.dtype).max, nan_passes, NORM=norm, CLAMP=clamp_kind(before), MASK=needs_mask,
        NARROW=x.dtype != torch.float32,
        FAST=int(os.environ.get("TRITON_INTERPRET") != "1"),  # which does not fuse what is to be fused
        EVEN=n % block == 0 and channels % rows == 0, ROWS=rows, BLOCK=block, ONE_BLOCK=n <= block, num_warps=warps,
        enable_fp_fusion=False)
    return y, scale, zero_point, mask


def _masked(grad: Tensor, mask: Tensor, scale: None, layout: Layout) -> Tensor:
    return torch.where(mask, grad, 0)


def granq(x: Tensor, bit_width: int, layout: Layout, before: Before, ahead: Ahead | None) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`."""
    return gradients.granq(_forward, _masked, x, bit_width, layout, before, ahead)
