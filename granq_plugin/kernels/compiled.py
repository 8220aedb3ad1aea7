"""The fused quantizers on CPU, through :mod:`~granq_plugin.kernels.native`, with their gradients."""

import torch
from torch import Tensor

from granq_plugin.functional import GranQResult
from granq_plugin.kernels import native
from granq_plugin.kernels.layout import Before, Layout

__all__ = ["affine_quantize", "granq"]


def granq(x: Tensor, bit_width: int, layout: Layout, before: Before) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`."""
    if x.requires_grad and torch.is_grad_enabled():
        return GranQResult(*_GranQ.apply(x, bit_width, layout, before))
    return GranQResult(*_forward(x, bit_width, layout, before, False)[:3])


def affine_quantize(
        x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout, before: Before) -> Tensor:
    """See :func:`granq_plugin.kernels.affine_quantize`. scale and zero_point are contiguous, with an element per channel."""
    if x.requires_grad and torch.is_grad_enabled():
        return _AffineQuantize.apply(x, scale, zero_point, limits, layout, before)
    return _affine(x, scale, zero_point, limits, layout, before, False)[0]


def _mask_size(layout: Layout) -> int:
    """Bytes of a mask: a bit for each value, 16 to a vector of the kernel, by row or pixel."""
    samples, outer, channels, inner = layout[:4]
    rows, n = (samples * channels, inner) if outer == 1 and inner != 1 else (samples * outer, channels)
    return 2 * rows * -(-n // 16)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _forward(x: Tensor, bit_width: int, layout: Layout, before: Before,
             needs_mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    y = torch.empty_like(x)
    scale = torch.empty(layout.scale_shape, dtype=torch.promote_types(x.dtype, torch.float32))
    zero_point = torch.empty_like(scale)
    mask = torch.empty(_mask_size(layout), dtype=torch.uint8) if needs_mask else None
    native.library(x.dtype).granq_forward(
        x.data_ptr(), y.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), _pointer(mask), *layout[:4], 2**bit_width - 1,
        *before.limits(x.dtype), native.threads_for(x))
    return y, scale, zero_point, mask


class _GranQ(torch.autograd.Function):
    """The gradient is the incoming one, where nothing was clamped away."""

    @staticmethod
    def forward(ctx, x: Tensor, bit_width: int, layout: Layout, before: Before):
        ctx.set_materialize_grads(False)
        y, scale, zero_point, ctx.mask = _forward(x, bit_width, layout, before, before.limits(x.dtype)[0])
        ctx.layout = layout
        ctx.mark_non_differentiable(scale, zero_point)
        return y, scale, zero_point

    @staticmethod
    def backward(ctx, grad: Tensor | None, *unused):
        if grad is not None and ctx.mask is not None:
            grad = _masked(grad, ctx.mask, None, ctx.layout)
        return grad, None, None, None


def _affine(x, scale, zero_point, limits, layout: Layout, before: Before, needs_mask: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x)
    mask = torch.empty(_mask_size(layout), dtype=torch.uint8) if needs_mask else None
    native.library(x.dtype).frozen_forward(
        x.data_ptr(), y.data_ptr(), _pointer(mask), scale.data_ptr(), zero_point.data_ptr(), *layout[:4], *limits,
        *before.limits(x.dtype), native.threads_for(x))
    return y, mask


class _AffineQuantize(torch.autograd.Function):
    """The gradient of Brevitas's path: times the scale, through it, zero where an integer was clamped."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout, before: Before):
        y, ctx.mask = _affine(x, scale, zero_point, limits, layout, before, True)
        ctx.scale, ctx.layout = scale, layout
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _masked(grad, ctx.mask, ctx.scale, ctx.layout), None, None, None, None, None


def _masked(grad: Tensor, mask: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
    """The gradient where a mask lets it pass, zero elsewhere; times and through a scale, if there is one."""
    if grad.requires_grad and torch.is_grad_enabled():
        return _Masked.apply(grad, mask, scale, layout)
    grad = grad.contiguous(memory_format=layout.memory_format)
    out = torch.empty_like(grad)
    native.library(grad.dtype).masked_backward(
        grad.data_ptr(), mask.data_ptr(), out.data_ptr(), _pointer(scale), *layout[:4], native.threads_for(grad))
    return out


class _Masked(torch.autograd.Function):
    """Linear: its own gradient is the same again."""

    @staticmethod
    def forward(ctx, grad: Tensor, mask: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        ctx.mask, ctx.scale, ctx.layout = mask, scale, layout
        return _masked(grad, mask, scale, layout)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _masked(grad, ctx.mask, ctx.scale, ctx.layout), None, None, None
