"""The fused quantizers on CPU, through :mod:`~granq_plugin.kernels.native`."""

import torch
from torch import Tensor

from granq_plugin.functional import GranQResult
from granq_plugin.kernels import gradients, native
from granq_plugin.kernels.layout import Ahead, Before, Layout

__all__ = ["affine_quantize", "granq"]


def granq(x: Tensor, bit_width: int, layout: Layout, before: Before, ahead: Ahead | None) -> GranQResult:
    """See :func:`granq_plugin.kernels.granq`."""
    return gradients.granq(_forward, _masked, x, bit_width, layout, before, ahead)


def affine_quantize(
        x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout, before: Before,
        ahead: Ahead | None) -> Tensor:
    """See :func:`granq_plugin.kernels.affine_quantize`. scale and zero_point are contiguous, with an element per channel."""
    return gradients.affine_quantize(_affine, _masked, x, scale, zero_point, limits, layout, before, ahead)


def _mask_size(layout: Layout) -> int:
    """Bytes of a mask: a bit for each value, 16 to a vector of the kernel, by row or pixel."""
    samples, outer, channels, inner = layout[:4]
    rows, n = (samples * channels, inner) if outer == 1 and inner != 1 else (samples * outer, channels)
    return 2 * rows * -(-n // 16)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _ahead(x: Tensor, ahead: Ahead | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Factors and shifts of a BatchNorm, and what is added."""
    if ahead is None:
        return None, None, None
    alpha, beta = torch.empty_like(ahead.mean), torch.empty_like(ahead.mean)
    native.library(x.dtype).batch_norm_affine(
        *map(_pointer, ahead[:4]), ahead.eps, ahead.mean.numel(), alpha.data_ptr(), beta.data_ptr())
    return alpha, beta, ahead.residual


def _forward(x: Tensor, bit_width: int, layout: Layout, before: Before, ahead: Ahead | None,
             needs_mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    y = torch.empty_like(x)
    scale = torch.empty(layout.scale_shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    zero_point = torch.empty_like(scale)
    mask = torch.empty(_mask_size(layout), dtype=torch.uint8, device=x.device) if needs_mask else None
    first = _ahead(x, ahead)
    native.library(x.dtype).granq_forward(
        x.data_ptr(), y.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), _pointer(mask), *map(_pointer, first), *layout[:4],
        2**bit_width - 1, *before.limits(x.dtype), native.threads_for(x))
    return y, scale, zero_point, mask


def _affine(x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], layout: Layout, before: Before,
            ahead: Ahead | None, needs_mask: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x)
    mask = torch.empty(_mask_size(layout), dtype=torch.uint8, device=x.device) if needs_mask else None
    first = _ahead(x, ahead)
    native.library(x.dtype).frozen_forward(
        x.data_ptr(), y.data_ptr(), _pointer(mask), scale.data_ptr(), zero_point.data_ptr(), *map(_pointer, first), *layout[:4],
        *limits, *before.limits(x.dtype), native.threads_for(x))
    return y, mask


def _masked(grad: Tensor, mask: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
    grad = grad.resolve_neg().contiguous(memory_format=layout.memory_format)
    out = torch.empty_like(grad)
    native.library(grad.dtype).masked_backward(
        grad.data_ptr(), mask.data_ptr(), out.data_ptr(), _pointer(scale), *layout[:4], native.threads_for(grad))
    return out
