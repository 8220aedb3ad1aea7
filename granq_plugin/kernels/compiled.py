"""The fused quantizers on CPU, through :mod:`~granq_plugin.kernels.native`, with their gradients."""

import torch
from torch import Tensor

from granq_plugin.functional import GranQResult
from granq_plugin.kernels import native
from granq_plugin.kernels.layout import Before, Layout

__all__ = ["granq"]


def granq(x: Tensor, bit_width: int, layout: Layout, before: Before) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`."""
    if x.requires_grad and torch.is_grad_enabled():
        return GranQResult(*_GranQ.apply(x, bit_width, layout, before))
    return GranQResult(*_forward(x, bit_width, layout, before, None, None, False)[:3])


def _mask_size(layout: Layout) -> int:
    """Bytes of a mask: a bit for each value, padded by row or channel as in granq.cpp."""
    samples, outer, channels, inner = layout[:4]
    if outer == 1 and inner != 1:
        return samples * channels * (-(-inner // 128) * 16)
    return samples * (-(-outer // 8)) * channels


def _forward(
        x: Tensor, bit_width: int, layout: Layout, before: Before, alpha: Tensor | None, beta: Tensor | None,
        needs_mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    y = torch.empty_like(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, zero_point = torch.empty(layout.scale_shape, dtype=wide), torch.empty(layout.scale_shape, dtype=wide)
    mask = torch.empty(_mask_size(layout), dtype=torch.uint8) if needs_mask else None
    native.library(x.dtype).granq_forward(
        x.data_ptr(), y.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), mask.data_ptr() if needs_mask else None,
        None if alpha is None else alpha.data_ptr(), None if beta is None else beta.data_ptr(), *layout[:4],
        2**bit_width - 1, *before.limits(x.dtype), native.threads_for(x))
    return y, scale, zero_point, mask


class _GranQ(torch.autograd.Function):
    """The gradient is the incoming one, where nothing was clamped away."""

    @staticmethod
    def forward(ctx, x: Tensor, bit_width: int, layout: Layout, before: Before):
        ctx.set_materialize_grads(False)
        y, scale, zero_point, ctx.mask = _forward(x, bit_width, layout, before, None, None, before.limits(x.dtype)[0])
        ctx.layout = layout
        ctx.mark_non_differentiable(scale, zero_point)
        return y, scale, zero_point

    @staticmethod
    def backward(ctx, grad: Tensor | None, *unused):
        if grad is not None and ctx.mask is not None:
            grad = _Masked.apply(grad, ctx.mask, None, ctx.layout)
        return grad, None, None, None


class _Masked(torch.autograd.Function):
    """The gradient where a mask lets it pass, zero elsewhere; times and through a scale, if there is one. Linear: its own
    gradient is the same again."""

    @staticmethod
    def forward(ctx, grad: Tensor, mask: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        ctx.mask, ctx.scale, ctx.layout = mask, scale, layout
        grad = grad.contiguous(memory_format=layout.memory_format)
        out = torch.empty_like(grad)
        native.library(grad.dtype).masked_backward(
            grad.data_ptr(), mask.data_ptr(), out.data_ptr(), None if scale is None else scale.data_ptr(), *layout[:4],
            native.threads_for(grad))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Masked.apply(grad, ctx.mask, ctx.scale, ctx.layout), None, None, None
