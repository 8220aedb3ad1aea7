"""The gradients of the kernels, whichever of them computes: a forward keeps where the gradient passes, the backward applies it.

A kernel brings functions: ``forward``, whose last argument asks for that mask and whose last result it is (None where there is
none), and ``masked(grad, mask, scale, layout)``: the gradient where a mask lets it pass, zero elsewhere; times and through a scale,
if there is one. The gradient of a BatchNorm ahead is torch's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from granq_plugin.functional import GranQResult
from granq_plugin.kernels.layout import IDENTITY, Ahead, Before, Layout

__all__ = ["affine_quantize", "granq"]


def granq(
        forward: Callable, masked: Callable, x: Tensor, bit_width: int, layout: Layout, before: Before,
        ahead: Ahead | None) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`; ``forward(x, bit_width, layout, before, ahead, needs_mask)``."""
    leaves = _leaves(x, ahead)
    if _learns(leaves):
        return GranQResult(*_GranQ.apply(forward, masked, *leaves, bit_width, layout, before, ahead))
    return GranQResult(*forward(x, bit_width, layout, before, ahead, False)[:3])


def affine_quantize(
        forward: Callable, masked: Callable, x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout,
        before: Before, ahead: Ahead | None) -> Tensor:
    """See :func:`granq_plugin.kernels.affine_quantize`; ``forward(x, scale, zero_point, limits, layout, before, ahead,
    needs_mask)``."""
    leaves = _leaves(x, ahead)
    if _learns(leaves):
        return _AffineQuantize.apply(forward, masked, *leaves, scale, zero_point, limits, layout, before, ahead)
    return forward(x, scale, zero_point, limits, layout, before, ahead, False)[0]


def _leaves(x: Tensor, ahead: Ahead | None) -> tuple[Tensor | None, ...]:
    return x, *((None, None, None) if ahead is None else ahead.leaves)


def _learns(leaves: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)


class _GranQ(torch.autograd.Function):
    """The gradient is the incoming one, where nothing was clamped away."""

    @staticmethod
    def forward(ctx, forward: Callable, masked: Callable, x: Tensor, weight, bias, residual, bit_width: int, layout: Layout,
                before: Before, ahead: Ahead | None):
        ctx.set_materialize_grads(False)
        y, scale, zero_point, ctx.mask = forward(x, bit_width, layout, before, ahead, before != IDENTITY)
        ctx.masked, ctx.layout = masked, layout
        _keep(ctx, x, ahead)
        ctx.mark_non_differentiable(scale, zero_point)
        return y, scale, zero_point

    @staticmethod
    def backward(ctx, grad: Tensor | None, *unused):
        if grad is not None and ctx.mask is not None:
            grad = _through(ctx.masked, grad, ctx.mask, None, ctx.layout)
        return None, None, *_ahead(ctx, grad), None, None, None, None


class _AffineQuantize(torch.autograd.Function):
    """The gradient of Brevitas's path: times the scale, through it, zero where an integer was clamped."""

    @staticmethod
    def forward(ctx, forward: Callable, masked: Callable, x: Tensor, weight, bias, residual, scale: Tensor, zero_point: Tensor,
                limits: tuple[int, int], layout: Layout, before: Before, ahead: Ahead | None):
        y, ctx.mask = forward(x, scale, zero_point, limits, layout, before, ahead, True)
        ctx.masked, ctx.scale, ctx.layout = masked, scale, layout
        _keep(ctx, x, ahead)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = _through(ctx.masked, grad, ctx.mask, ctx.scale, ctx.layout)
        return None, None, *_ahead(ctx, grad), None, None, None, None, None, None


def _keep(ctx, x: Tensor, ahead: Ahead | None) -> None:
    """What :func:`_ahead` needs; nothing without a BatchNorm."""
    ctx.eps = None if ahead is None else ahead.eps
    if ahead is not None:
        ctx.save_for_backward(x, ahead.weight, ahead.mean, ahead.var)


def _ahead(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of values, weight, bias and residual, from that of what is clamped."""
    if ctx.eps is None or grad is None:
        return grad, None, None, None
    x, weight, mean, var = ctx.saved_tensors
    needed = ctx.needs_input_grad[2:6]
    grads = None, None, None
    if any(needed[:3]):
        of_batch = mean.new_empty(0)  # what a forward in evaluation mode saves: cuDNN's peer insists on it
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, of_batch, of_batch, False, ctx.eps, list(needed[:3]))
    return *(g if n else None for g, n in zip(grads, needed)), grad if needed[3] else None


def _through(masked: Callable, grad: Tensor, mask: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
    if grad.requires_grad and torch.is_grad_enabled():
        return _Masked.apply(masked, grad, mask, scale, layout)
    if not torch._C._has_storage(grad):  # a batch of gradients, as for a Jacobian: no kernel can read it
        passes = masked(torch.ones(grad.shape, dtype=grad.dtype, device=mask.device), mask, scale, layout) != 0
        return torch.where(passes, grad if scale is None else grad * scale / scale, 0)
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
