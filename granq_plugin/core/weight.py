"""Weight quantizers: the ``tensor_quant`` of a Brevitas weight proxy."""

import torch
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin import kernels
from granq_plugin.core.base import GranQBase
from granq_plugin.core.int_quant import has_stock_arithmetic

__all__ = ["MinMaxWeightQuant", "PerKernelGranQ"]


class MinMaxWeightQuant(GranQBase):
    """Per-output-channel min/max of the weight, detached, with identity gradient: the paper's text for weights.

    Args:
        int_quant, int_scaling_impl, bit_width: see :class:`~granq_plugin.core.base.GranQBase`.
        output_channel_dim: where the output channels stand (0; 1 for transposed convolutions).
        signed: False: asymmetric. True: symmetric, zero point 0.

    Returns:
        ``(value, scale, zero_point, bit_width)``, scale of shape ``[O, 1, ...]``. A grouped transposed convolution has the weight
        ``[I, O / groups, ...]``: there, as in Brevitas, channels at the same place of every group share a scale.
    """

    def __init__(
            self,
            int_quant: nn.Module,
            int_scaling_impl: nn.Module,
            bit_width: int,
            output_channel_dim: int,
            signed: bool) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width)
        GF.check_symmetric(signed, self.bit_width)
        self.output_channel_dim = output_channel_dim
        self.signed = signed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bit_width = self.bits
        axes = [d for d in range(x.dim()) if d != self.output_channel_dim % x.dim()]
        w = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        scale, zero_point = GF.affine_params(
            w.amin(axes, keepdim=True), w.amax(axes, keepdim=True), self.bit_width, self.signed)
        if has_stock_arithmetic(self.int_quant):
            limits = GF.integer_limits(self.bit_width, self.signed, self.int_quant.narrow_range)
            return kernels.affine_quantize(x, scale, zero_point, limits, self.output_channel_dim), scale, zero_point, bit_width
        return self.int_quant(scale, zero_point, bit_width, x).to(x.dtype), scale, zero_point, bit_width


class PerKernelGranQ(GranQBase):
    """The paper's formula on a weight: one range per (output, input) kernel, ``[O, I, 1, ...]``, or per row of a linear weight.

    Args:
        int_quant, int_scaling_impl, bit_width: see :class:`~granq_plugin.core.base.GranQBase`.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *kernels.granq(x, self.bit_width), self.bits
