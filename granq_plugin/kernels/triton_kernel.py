"""The dynamic quantizer on GPU, in Triton. A row stays on chip up to ``LONGEST_ROW`` values; a longer one is read twice.

Imported where there is a GPU, or where ``GRANQ_KERNEL=triton`` asks for it: with ``TRITON_INTERPRET=1`` it runs on CPU tensors.
Results are those of :func:`granq_plugin.functional.granq` bit for bit: divisions round correctly, multiplications and additions are
not fused, and rounding is to even.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from granq_plugin.functional import MIN_RANGE, GranQResult
from granq_plugin.kernels.layout import Before, Layout

__all__ = ["DTYPES", "LONGEST_ROW", "granq"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 stays with torch's operations
LONGEST_ROW = 16384
_TILE = 4096  # values of a program, where rows are short


@triton.jit
def _round(x):
    """To the nearest integer, half to even: adding 2^23 leaves no fraction. Values beyond are integers already."""
    magnitude = tl.abs(x)
    rounded = (magnitude + 8388608.0) - 8388608.0
    return tl.where(magnitude < 8388608.0, tl.where(x < 0, -rounded, rounded), x)


@triton.jit
def _clamped(x, low, high, CLAMP: tl.constexpr):
    if CLAMP:
        x = tl.where(x < low, low, x)  # NaN stays
        x = tl.where(x > high, high, x)
    return x


@triton.jit
def _rounded_to_bfloat16(x):
    """To nearest even, in float32: a GPU's conversion does that too, the interpreter's cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _granq(
        x_ptr, y_ptr, mask_ptr, scale_ptr, zero_point_ptr, channels, row_stride, sample_stride, step, n, tiles, half_levels,
        overflow, smallest, low, high, above, below, largest, nan_passes, nan, CLAMP: tl.constexpr, MASK: tl.constexpr,
        NARROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    sample = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    exists = channel < channels
    row = sample.to(tl.int64) * sample_stride + channel.to(tl.int64) * row_stride
    place = tl.arange(0, BLOCK)
    lo = tl.full([ROWS], float("inf"), tl.float32)
    hi = tl.full([ROWS], float("-inf"), tl.float32)
    has_nan = tl.full([ROWS], 0, tl.int32)
    x = tl.zeros([ROWS, BLOCK], tl.float32)  # a row of one block is loaded once
    for start in range(0, n, BLOCK):
        at = start + place
        inside = exists[:, None] & (at < n)[None, :]
        address = row[:, None] + at[None, :].to(tl.int64) * step
        x = tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)
        if MASK:
            passes = (tl.where(x <= above, 0, 1) * tl.where(x >= below, 0, 1)) * tl.where(x == x, 1, nan_passes)
            tl.store(mask_ptr + address, passes.to(tl.int8), mask=inside)
        x = _clamped(x, low, high, CLAMP)
        lo = tl.minimum(lo, tl.min(tl.where(inside & (x == x), x, float("inf")), axis=1))
        hi = tl.maximum(hi, tl.max(tl.where(inside & (x == x), x, float("-inf")), axis=1))
        has_nan = has_nan | tl.max(tl.where(inside & (x != x), 1, 0), axis=1)
    lo = tl.where(has_nan > 0, nan, lo)
    hi = tl.where(has_nan > 0, nan, hi)
    # functional.inverse_scale
    half = hi * 0.5 - lo * 0.5
    half = tl.where(half < smallest, smallest, half)
    magnitude = tl.where(hi > -lo, hi, -lo) * overflow
    divisor = tl.where(magnitude > half, magnitude, half)
    one = tl.full([ROWS], 1.0, tl.float32)
    inv_scale = tl.div_rn(one, divisor) * half_levels
    offset = _round(inv_scale * lo)
    tl.store(scale_ptr + sample * channels + channel, tl.div_rn(one, inv_scale), mask=exists)
    tl.store(zero_point_ptr + sample * channels + channel, 0.0 - offset, mask=exists)
    for start in range(0, n, BLOCK):
        at = start + place
        inside = exists[:, None] & (at < n)[None, :]
        address = row[:, None] + at[None, :].to(tl.int64) * step
        if not ONE_BLOCK:
            x = _clamped(tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32), low, high, CLAMP)
        y = _round(x * inv_scale[:, None] - offset[:, None]) + offset[:, None]
        y = tl.div_rn(y, tl.zeros([ROWS, BLOCK], tl.float32) + inv_scale[:, None])
        if NARROW:
            y = _clamped(y, -largest, largest, True)
        if y_ptr.dtype.element_ty == tl.bfloat16:
            y = _rounded_to_bfloat16(y)
        tl.store(y_ptr + address, y.to(y_ptr.dtype.element_ty), mask=inside)


def _tile(layout: Layout) -> tuple[int, int, int]:
    """``(rows, values of a row, warps)`` of a program."""
    n, channels = layout.outer * layout.inner, triton.next_power_of_2(layout.channels)
    if layout.inner == 1 and layout.outer > 1:  # channels_last: whole cache lines of neighbouring channels
        rows, block = min(32, channels), min(triton.next_power_of_2(n), 256)
    else:
        block = triton.next_power_of_2(n) if n <= LONGEST_ROW else _TILE
        rows = min(max(1, _TILE // block), 64, channels)
    return rows, block, max(4, min(32, rows * block // 1024))


def _forward(x: Tensor, bit_width: int, layout: Layout, before: Before, needs_mask: bool):
    samples, outer, channels, inner = layout[:4]
    y = torch.empty_like(x)
    mask = torch.empty_like(x, dtype=torch.bool) if needs_mask else None
    scale, zero_point = (torch.empty(layout.scale_shape, dtype=torch.float32, device=x.device) for _ in range(2))
    n = outer * inner
    rows, block, warps = _tile(layout)
    tiles = triton.cdiv(channels, rows)
    levels, largest = 2**bit_width - 1, torch.finfo(torch.float32).max
    clamp, low, high, above, below, nan_passes = before.limits(x.dtype)
    _granq[(samples * tiles, )](
        x, y, mask.view(torch.int8) if needs_mask else x, scale, zero_point, channels, inner, outer * channels * inner,
        channels if inner == 1 and outer > 1 else 1, n, tiles, levels / 2, levels / largest, MIN_RANGE / 2, low, high, above, below,
        torch.finfo(x.dtype).max, nan_passes, float("nan"), CLAMP=bool(clamp), MASK=needs_mask, NARROW=x.dtype != torch.float32,
        ROWS=rows, BLOCK=block, ONE_BLOCK=n <= block, num_warps=warps, enable_fp_fusion=False)
    return y, scale, zero_point, mask


class _GranQ(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, bit_width: int, layout: Layout, before: Before):
        ctx.set_materialize_grads(False)
        y, scale, zero_point, ctx.mask = _forward(x, bit_width, layout, before, bool(before.limits(x.dtype)[0]))
        ctx.mark_non_differentiable(scale, zero_point)
        return y, scale, zero_point

    @staticmethod
    def backward(ctx, grad: Tensor | None, *unused):
        if grad is not None and ctx.mask is not None:
            grad = torch.where(ctx.mask, grad, 0)
        return grad, None, None, None


def granq(x: Tensor, bit_width: int, layout: Layout, before: Before) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`."""
    if x.requires_grad and torch.is_grad_enabled():
        return GranQResult(*_GranQ.apply(x, bit_width, layout, before))
    return GranQResult(*_forward(x, bit_width, layout, before, False)[:3])
