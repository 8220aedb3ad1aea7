"""The paper's quantizer as the ``tensor_quant`` of a Brevitas activation proxy."""

import torch
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin import kernels
from granq_plugin.core.base import ActClamp, GranQBase

__all__ = ["DynamicGranQ"]


class DynamicGranQ(GranQBase):
    """Per sample and channel, ranges recomputed at every forward (arXiv 2503.18339; :func:`granq_plugin.functional.granq`).

    Args:
        int_quant, int_scaling_impl, bit_width: see :class:`~granq_plugin.core.base.GranQBase`.
        scaling_impl: a :class:`~granq_plugin.core.ranges.DynamicRange`, reachable for graph mode.
        channel_axis: where C stands in the input; not 0.
        min_val, max_val: clamp applied before quantization, or None.
        check_finite: raise a ValueError on NaN or Inf input. False: they poison their own channel only.

    Returns:
        ``(value, scale, zero_point, bit_width)``; a 0-d input (Brevitas's sentinel) comes back as it is, with unit scale.

    Note:
        ``quantizer(x, True, ahead)`` is ``quantizer(torch.relu(ahead.apply(x)))`` in one pass (:func:`granq_plugin.kernels.granq`).
    """

    fuses = True
    symmetric = False

    def __init__(
            self,
            int_quant: nn.Module,
            int_scaling_impl: nn.Module,
            scaling_impl: nn.Module,
            bit_width: int,
            channel_axis: int = 1,
            min_val: float | None = None,
            max_val: float | None = None,
            check_finite: bool = False) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width)
        self.scaling_impl = scaling_impl
        self.clamp = ActClamp(min_val, max_val)
        self.channel_axis = channel_axis
        self.check_finite = check_finite

    def forward(self, x: Tensor, relu: bool = False, ahead: kernels.Ahead | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bit_width = self.bits
        GF.check_float(x)
        if x.dim() == 0:
            return x, torch.ones_like(x), torch.zeros_like(x), bit_width
        before = self.clamp.after(relu)
        if self.check_finite or self.observer_only:
            x, before, ahead = before.apply(x, ahead), kernels.IDENTITY, None
        if self.check_finite:
            GF.check_finite(x)
        value, scale, zero_point = kernels.granq(x, self.bit_width, self.channel_axis, before, ahead)
        return (x if self.observer_only else value), scale, zero_point, bit_width
