"""Weight quantizers: the ``tensor_quant`` of a Brevitas weight proxy."""

import torch
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin import kernels
from granq_plugin.core.base import GranQBase
from granq_plugin.core.int_quant import clamps_straight_through, has_stock_arithmetic
from granq_plugin.core.least_squares import errors_of_shares, least_error_range

__all__ = ["MinMaxWeightQuant", "PerKernelGranQ"]

RANGE_MODES = ("minmax", "mse")
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the min/max range, which "mse" tries


class MinMaxWeightQuant(GranQBase):
    """Per-output-channel min/max of the weight, detached, with identity gradient: the paper's text for weights.

    Args:
        int_quant, int_scaling_impl, bit_width: see :class:`~granq_plugin.core.base.GranQBase`.
        output_channel_dim: where the output channels stand (0; 1 for transposed convolutions).
        signed: False: asymmetric. True: symmetric, zero point 0.
        range_mode: "minmax", or "mse": of seven shares of that range, from 0.4 to 1, the one with the least squared error,
            channel by channel and at every forward; weights beyond it are clipped, and get no gradient. At 3 bits the
            outermost weights cost the others more than they are worth.

    Raises:
        ValueError: for an unknown range_mode.

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
            signed: bool,
            range_mode: str = "minmax") -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width)
        GF.check_symmetric(signed, self.bit_width)
        if range_mode not in RANGE_MODES:
            raise ValueError(f"range_mode of weights must be one of {', '.join(RANGE_MODES)}, got {range_mode!r}")
        self.output_channel_dim = output_channel_dim
        self.signed = signed
        self.range_mode = range_mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bit_width = self.bits
        axes = [d for d in range(x.dim()) if d != self.output_channel_dim % x.dim()]
        w = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        lo, hi = w.amin(axes, keepdim=True), w.amax(axes, keepdim=True)
        if self.range_mode == "mse":
            def quantize(w, lo, hi):
                return self._quantize(w, *GF.affine_params(lo, hi, self.bit_width, self.signed))

            lo, hi = least_error_range(lo, hi, _SHARES, errors_of_shares(w, lo, hi, _SHARES, quantize, axes))
        scale, zero_point = GF.affine_params(lo, hi, self.bit_width, self.signed)
        if has_stock_arithmetic(self.int_quant):
            return self._quantize(x, scale, zero_point), scale, zero_point, bit_width
        if clamps_straight_through(self.int_quant):
            value = self._quantize(x.detach(), scale, zero_point)
            return _StraightThrough.apply(x, value), scale, zero_point, bit_width
        return self.int_quant(scale, zero_point, bit_width, x).to(x.dtype), scale, zero_point, bit_width

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        limits = GF.integer_limits(self.bit_width, self.signed, self.int_quant.narrow_range)
        return kernels.affine_quantize(x, scale, zero_point, limits, self.output_channel_dim)


class _StraightThrough(torch.autograd.Function):
    """``value``, with the gradient passed on to x as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class PerKernelGranQ(GranQBase):
    """The paper's formula on a weight: one range per (output, input) kernel, ``[O, I, 1, ...]``, or per row of a linear weight.

    Args:
        int_quant, int_scaling_impl, bit_width: see :class:`~granq_plugin.core.base.GranQBase`.
    """
    symmetric = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *kernels.granq(x, self.bit_width), self.bits
