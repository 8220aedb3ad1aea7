"""The maths of GranQ as plain tensor functions (arXiv 2503.18339, section 3).

Two families live here:

* the paper's dynamic quantizer, :func:`granq`: one range per sample and channel, recomputed at every call, no clamp,
  identity straight-through gradient;
* the affine parameters of a *known* range, :func:`affine_params`, for static activations and for weights.

Shapes are written ``[B, C, *spatial]``; k is the bit width. ``inv_scale`` is the paper's s (levels per unit), ``scale`` is
Brevitas's (the real value of one step, 1 / s). Ranges and scales are never computed in less than float32: in float16 the
paper's 1e-8 underflows and dead channels become NaN, in bfloat16 about 10 % of values move by more than half a step at 8 bits.
"""

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MIN_RANGE",
    "GranQResult",
    "affine_params",
    "affine_quantize",
    "channel_range",
    "check_bit_width",
    "check_finite",
    "check_float",
    "check_symmetric",
    "fake_quantize",
    "granq",
    "integer_limits",
    "inverse_scale",
    "quantize_to_integers",
]

MIN_RANGE = 1e-8
"""The smallest range of a channel (paper's epsilon). A constant channel is quantized with this step, not divided by zero."""

MAX_BIT_WIDTH = 16
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class GranQResult(NamedTuple):
    """What :func:`granq` returns.

    Attributes:
        value: the fake-quantized tensor; shape and dtype of the input.
        scale: real value of one step, broadcastable to ``value``, float32 (float64 for a float64 input).
        zero_point: integer-valued offset of the same shape as ``scale``; ``value = (q - zero_point) * scale`` up to rounding.
    """

    value: Tensor
    scale: Tensor
    zero_point: Tensor


def check_bit_width(bit_width) -> int:
    """Return ``bit_width`` as an int.

    Args:
        bit_width: an int, or an integral float or one-element tensor (Brevitas keeps bit widths as float tensors).

    Raises:
        TypeError: if it is not a number. ValueError: if it is not a whole number from 1 to 16.
    """
    if type(bit_width) is int and 1 <= bit_width <= MAX_BIT_WIDTH:
        return bit_width
    if isinstance(bit_width, Tensor) and bit_width.numel() == 1:
        bit_width = bit_width.item()
    allowed = f"a whole number from 1 to {MAX_BIT_WIDTH}"
    if isinstance(bit_width, bool) or not isinstance(bit_width, numbers.Real):
        raise TypeError(f"bit width must be {allowed}, got {bit_width!r}")
    if bit_width != bit_width or bit_width not in range(1, MAX_BIT_WIDTH + 1):
        raise ValueError(f"bit width must be {allowed}, got {bit_width!r}")
    return int(bit_width)


def check_symmetric(signed: bool, bit_width: int) -> None:
    """Raise a ValueError for signed 1-bit quantization, which has no positive level."""
    if signed and bit_width < 2:
        raise ValueError(f"symmetric signed quantization needs a bit width of at least 2, got {bit_width}")


def check_finite(x: Tensor) -> None:
    """Raise a ValueError that counts the NaN and Inf values of ``x``, if it has any. Reads the tensor once (a device sync)."""
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        raise ValueError(f"input has {bad} NaN or Inf values of {x.numel()}; each would poison its whole channel")


def check_float(x: Tensor) -> None:
    """Raise a TypeError unless ``x`` is a float tensor."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOAT_DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"input must be a float16, bfloat16, float32 or float64 tensor, got {got}")


def _reduced_axes(x: Tensor, channel_axis: int, per_sample: bool) -> list[int]:
    axis = channel_axis + x.dim() if channel_axis < 0 else channel_axis
    if x.dim() == 1:  # one unbatched sample [F]: a row when per sample, features otherwise
        return [0] if per_sample else []
    if not 0 < axis < x.dim():
        raise ValueError(
            f"channel_axis={channel_axis} does not name a channel of a {x.dim()}-D input {tuple(x.shape)}; "
            f"allowed: 1 to {x.dim() - 1}, or negative from -1 (axis 0 is the batch)")
    if per_sample:
        kept = (0, ) if x.dim() == 2 else (0, axis)
    else:
        kept = (axis, )
    return [d for d in range(x.dim()) if d not in kept]


def channel_range(x: Tensor, channel_axis: int = 1, per_sample: bool = True) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every channel, detached.

    Args:
        x: float tensor ``[B, C, *spatial]``, any number of spatial axes, or ``[B, F]``.
        channel_axis: where C stands; not 0.
        per_sample: True (paper): one range per sample and channel, ``[B, C, 1, ...]``, and for ``[B, F]`` one per row, ``[B, 1]``.
            False (static): one per channel over the whole batch, ``[1, C, 1, ...]``, and for ``[B, F]`` one per feature.

    Returns:
        ``(lo, hi)``, broadcastable to ``x``, in float32 (float64 for a float64 input).

    Raises:
        TypeError: if x is not a float tensor. ValueError: if channel_axis names no channel of x, or x is empty.

    Note:
        A NaN or Inf poisons the range of its own channel (of its own sample) and no other.

    Example:
        >>> lo, hi = channel_range(torch.rand(2, 3, 8, 8))
        >>> list(lo.shape), list(channel_range(torch.rand(2, 3, 8, 8), per_sample=False)[0].shape)
        ([2, 3, 1, 1], [1, 3, 1, 1])
    """
    check_float(x)
    axes = _reduced_axes(x, channel_axis, per_sample)
    if x.numel() == 0:
        raise ValueError(f"an empty tensor {tuple(x.shape)} has no range")
    x = x.detach()
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not axes:
        return x.to(dtype), x.to(dtype)
    # amin + amax: torch.aminmax over several axes is about 20x slower on CPU
    return x.amin(axes, keepdim=True).to(dtype), x.amax(axes, keepdim=True).to(dtype)


def inverse_scale(lo: Tensor, hi: Tensor, bit_width: int) -> tuple[Tensor, Tensor]:
    """The paper's s and z of a range: ``s = (2^k - 1) / max(hi - lo, 1e-8)``, ``z = round(s * lo)``.

    Args:
        lo, hi: ends of the ranges, float32 or float64, same shape.
        bit_width: k, from 1 to 16.

    Returns:
        ``(inv_scale, offset)``, shape and dtype of ``lo``. ``offset`` is integer-valued.

    Note:
        Bit-identical to the formula as torch evaluates it (``number / tensor`` is ``tensor.reciprocal() * number``) for ranges up
        to a quarter of the dtype's largest value and magnitudes that s does not carry beyond half of it. Past that, where the
        formula overflows, s is reduced just enough that finite input never becomes NaN. Work is done on half ranges, an exact
        change.
    """
    levels = 2**bit_width - 1
    half_range = (hi * 0.5 - lo * 0.5).clamp_min(MIN_RANGE / 2)
    overflow_limit = torch.maximum(hi, -lo) * (levels / torch.finfo(lo.dtype).max)
    inv_scale = torch.maximum(half_range, overflow_limit).reciprocal() * (levels / 2)
    return inv_scale, torch.round(inv_scale * lo)


class _FakeQuantize(torch.autograd.Function):
    """Round to the grid of (inv_scale, offset); the gradient passes unchanged (straight-through estimator)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, inv_scale: Tensor, offset: Tensor) -> Tensor:
        # one allocation, then in place; the order of operations is the paper's, and bit-exactness depends on it
        y = x * inv_scale
        y = y.sub_(offset).round_().add_(offset).div_(inv_scale)
        if x.dtype != y.dtype:  # half precision: without a clamp the last level may lie beyond the largest value
            limit = torch.finfo(x.dtype).max
            y = y.clamp_(-limit, limit).to(x.dtype)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def fake_quantize(x: Tensor, inv_scale: Tensor, offset: Tensor) -> Tensor:
    """``(round(s * x - z) + z) / s`` with an identity gradient; no clamp (paper).

    Args:
        x: float tensor. inv_scale, offset: s and z of :func:`inverse_scale`, broadcastable to x, float32 or float64.

    Returns:
        Tensor of the shape, dtype and memory format of x. The arithmetic is done in the dtype of ``inv_scale``.
    """
    return _FakeQuantize.apply(x, inv_scale, offset)


def granq(x: Tensor, bit_width: int, channel_axis: int = 1) -> GranQResult:
    """Quantize and dequantize ``x`` per sample and channel (arXiv 2503.18339): all B*C ranges and scales as tensors, in one pass.

    Args:
        x: float tensor ``[B, C, *spatial]``, or ``[B, F]`` (one range per row).
        bit_width: k, from 1 to 16.
        channel_axis: where C stands; not 0.

    Returns:
        :class:`GranQResult`. Its value carries an identity gradient to x. The integers ``round(s * x - z)`` lie in
        ``[0, 2^k - 1]``, except that the paper's formula (no clamp) reaches 2^k where s * lo is exactly half-way
        between two integers, as for a range symmetric around 0.

    Raises:
        TypeError, ValueError: see :func:`check_bit_width` and :func:`channel_range`.

    Example:
        >>> x = torch.tensor([[[0.0, 0.4, 1.0], [0.0, 4.0, 10.0]]])  # [1, 2, 3]
        >>> granq(x, 1).value
        tensor([[[ 0.,  0.,  1.],
                 [ 0.,  0., 10.]]])
    """
    bit_width = check_bit_width(bit_width)
    if isinstance(x, Tensor) and x.numel() == 0:
        return _empty_result(x, channel_axis)
    inv_scale, offset = inverse_scale(*channel_range(x, channel_axis), bit_width)
    return GranQResult(fake_quantize(x, inv_scale, offset), inv_scale.reciprocal(), 0 - offset)


def _empty_result(x: Tensor, channel_axis: int) -> GranQResult:
    """An empty batch has no range: unit scales of the right broadcastable shape, and a differentiable empty value."""
    check_float(x)
    axes = _reduced_axes(x, channel_axis, per_sample=True)
    shape = [1 if d in axes else n for d, n in enumerate(x.shape)]
    scale = x.new_ones(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return GranQResult(x.clone(), scale, torch.zeros_like(scale))


def affine_params(lo: Tensor, hi: Tensor, bit_width: int, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point, in Brevitas's sense, of a range that is stretched to contain 0.

    Zero stays on the grid (padding and pruned weights remain exact) and an unsigned zero point stays in [0, 2^k - 1], as
    QONNX and QCDQ require. After a ReLU lo is 0, and so the zero point is exactly 0.

    Args:
        lo, hi: ends of the ranges, float32 or float64, same shape.
        bit_width: k, from 1 to 16.
        signed: False: asymmetric, integers 0 to 2^k - 1. True: symmetric, zero point 0, the largest magnitude at 2^(k-1) - 1.

    Returns:
        ``(scale, zero_point)``, shape and dtype of ``lo``; ``zero_point`` is integer-valued. scale >= 1e-8 / (number of steps),
        so a dead channel divides by no zero.

    Raises:
        ValueError, TypeError: see :func:`check_bit_width` and :func:`check_symmetric`.
    """
    check_symmetric(signed, check_bit_width(bit_width))
    lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
    # a GPU multiplies by the reciprocal of a plain number, which is not what the CPU computes
    if signed:
        scale = torch.maximum(-lo, hi).clamp_min(MIN_RANGE) / lo.new_full((), 2**(bit_width - 1) - 1)
        return scale, torch.zeros_like(scale)
    # half ranges: hi - lo may overflow where neither end does
    scale = (hi * 0.5 - lo * 0.5).clamp_min(MIN_RANGE / 2) / lo.new_full((), (2**bit_width - 1) / 2)
    return scale, torch.round(-lo / scale).abs()  # abs: no negative zero


def integer_limits(bit_width: int, signed: bool = False, narrow_range: bool = False) -> tuple[int, int]:
    """The lowest and the highest integer of a bit width; ``narrow_range`` gives up one of them, as in Brevitas."""
    if signed:
        return -2**(bit_width - 1) + narrow_range, 2**(bit_width - 1) - 1
    return 0, 2**bit_width - 1 - narrow_range


class _AffineQuantize(torch.autograd.Function):
    """The arithmetic of Brevitas's IntQuant in one chain, and the gradient of its path, factor by factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
        y = x / scale
        return y.add_(zero_point).round_().clamp_(lowest, highest).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.limits = inputs[3:]

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        q = torch.round(x / scale + zero_point)
        clipped = (q < ctx.limits[0]) | (q > ctx.limits[1])
        return torch.where(clipped, 0, grad * scale / scale).to(x.dtype), None, None, None, None


def affine_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int]) -> Tensor:
    """``(clamp(round(x / scale + zero_point)) - zero_point) * scale`` with the straight-through gradient inside the limits.

    Equal to Brevitas's ``IntQuant`` (round half to even, ``TensorClamp``) bit for bit, its gradient to x too; scale and
    zero_point get none.

    Args:
        x: float tensor. scale, zero_point: of :func:`affine_params`, broadcastable to x, float32 or float64.
        limits: of :func:`integer_limits`.

    Returns:
        Tensor of the shape and dtype of x. The arithmetic is done in the dtype of ``scale``, or in that of x if it is wider.
    """
    return _AffineQuantize.apply(x, scale, zero_point, *limits)


def quantize_to_integers(x: Tensor, scale: Tensor, zero_point: Tensor, bit_width: int, signed: bool = False,
                         narrow_range: bool = False) -> Tensor:
    """The integers behind :func:`affine_quantize`, as an accelerator holds them.

    Args:
        x, scale, zero_point: see :func:`affine_quantize`. bit_width, signed, narrow_range: see :func:`integer_limits`.

    Returns:
        Tensor of the shape of x, without gradient: uint8 or int8 up to 8 bits, int32 above. Subtracting ``zero_point`` and
        multiplying by ``scale`` gives :func:`affine_quantize` exactly.

    Raises:
        ValueError: see :func:`check_bit_width` and :func:`check_finite`: no integer stands for NaN or Inf.

    Example:
        >>> x = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
        >>> scale, zero_point = affine_params(x.amin(), x.amax(), bit_width=2)
        >>> quantize_to_integers(x, scale, zero_point, bit_width=2)
        tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    """
    bit_width = check_bit_width(bit_width)
    check_finite(x)
    dtype = torch.int32 if bit_width > 8 else torch.int8 if signed else torch.uint8
    integers = torch.round(x.detach() / scale.detach() + zero_point)
    return integers.clamp(*integer_limits(bit_width, signed, narrow_range)).to(dtype)
