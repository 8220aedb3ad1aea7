"""The gradients of the kernels, whichever of them computes: a forward keeps where the gradient passes, the backward applies it.

A kernel brings functions: ``forward``, whose last argument asks for that mask and whose last result it is (None where there is
none), and ``masked(grad, mask, scale, layout)``: the gradient where a mask lets it pass, zero elsewhere; times and through a scale,
if there is one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from granq_plugin.functional import GranQResult
from granq_plugin.kernels.layout import IDENTITY, Before, Layout

__all__ = ["affine_quantize", "granq"]


def granq(forward: Callable, masked: Callable, x: Tensor, bit_width: int, layout: Layout, before: Before) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`; ``forward(x, bit_width, layout, before, needs_mask)``."""
    if x.requires_grad and torch.is_grad_enabled():
        return GranQResult(*_GranQ.apply(forward, masked, x, bit_width, layout, before))
    return GranQResult(*forward(x, bit_width, layout, before, False)[:3])


def affine_quantize(
        forward: Callable, masked: Callable, x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout,
        before: Before) -> Tensor:
    """See :func:`granq_plugin.kernels.affine_quantize`; ``forward(x, scale, zero_point, limits, layout, before, needs_mask)``."""
    if x.requires_grad and torch.is_grad_enabled():
        return _AffineQuantize.apply(forward, masked, x, scale, zero_point, limits, layout, before)
    return forward(x, scale, zero_point, limits, layout, before, False)[0]


class _GranQ(torch.autograd.Function):
    """The gradient is the incoming one, where nothing was clamped away."""

    @staticmethod
    def forward(ctx, forward: Callable, masked: Callable, x: Tensor, bit_width: int, layout: Layout, before: Before):
        ctx.set_materialize_grads(False)
        y, scale, zero_point, ctx.mask = forward(x, bit_width, layout, before, before != IDENTITY)
        ctx.masked, ctx.layout = masked, layout
        ctx.mark_non_differentiable(scale, zero_point)
        return y, scale, zero_point

    @staticmethod
    def backward(ctx, grad: Tensor | None, *unused):
        if grad is not None and ctx.mask is not None:
            grad = _through(ctx.masked, grad, ctx.mask, None, ctx.layout)
        return None, None, grad, None, None, None


class _AffineQuantize(torch.autograd.Function):
    """The gradient of Brevitas's path: times the scale, through it, zero where an integer was clamped."""

    @staticmethod
    def forward(
            ctx, forward: Callable, masked: Callable, x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int],
            layout: Layout, before: Before):
        y, ctx.mask = forward(x, scale, zero_point, limits, layout, before, True)
        ctx.masked, ctx.scale, ctx.layout = masked, scale, layout
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, _through(ctx.masked, grad, ctx.mask, ctx.scale, ctx.layout), None, None, None, None, None


def _through(masked: Callable, grad: Tensor, mask: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
    if grad.requires_grad and torch.is_grad_enabled():
        return _Masked.apply(masked, grad, mask, scale, layout)
    return masked(grad, mask, scale, layout)


class _Masked(torch.autograd.Function):
    """Linear: its own gradient is the same again."""

    @staticmethod
    def forward(ctx, masked: Callable, grad: Tensor, mask: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
        ctx.masked, ctx.mask, ctx.scale, ctx.layout = masked, mask, scale, layout
        return masked(grad, mask, scale, layout)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, _through(ctx.masked, grad, ctx.mask, ctx.scale, ctx.layout), None, None, None
