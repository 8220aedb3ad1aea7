"""Brevitas's ``IntQuant``, and when a kernel may take its place."""

from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp, TensorClampSte
from brevitas.core.quant import IntQuant
from brevitas.core.quant.delay import _NoDelay
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin import kernels

__all__ = ["FusedIntQuant", "clamps_straight_through", "has_stock_arithmetic"]


class FusedIntQuant(IntQuant):
    """Brevitas's ``IntQuant`` in one pass, where it has one scale for the whole tensor: the same values and gradients.

    For the injector of a stock quantizer: ``Uint8ActPerTensorFloat.let(int_quant=FusedIntQuant)``. It computes as its base class
    does what no kernel serves: several scales, learned ones, half precision, rounding other than to nearest, tracing, GPUs.
    """

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        if self._is_served(scale, zero_point, bit_width, x):
            limits = GF.integer_limits(int(bit_width), self.signed, self.narrow_range)
            return kernels.affine_quantize(x, scale, zero_point, limits)
        return super().forward(scale, zero_point, bit_width, x)

    def _is_served(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> bool:
        return (not kernels.is_observed() and x.is_cpu and x.dim() > 1 and x.dtype == scale.dtype == zero_point.dtype
                and scale.numel() == zero_point.numel() == 1
                and not (scale.requires_grad or zero_point.requires_grad or bit_width.requires_grad)
                and has_stock_arithmetic(self))


def has_stock_arithmetic(int_quant: nn.Module) -> bool:
    """Whether an IntQuant rounds half to even, clamps with TensorClamp and does nothing else, so that a kernel may replace it."""
    return _rounds_and_clamps_with(TensorClamp, int_quant)


def clamps_straight_through(int_quant: nn.Module) -> bool:
    """As :func:`has_stock_arithmetic`, but with TensorClampSte: the gradient passes where the clamp binds, too."""
    return _rounds_and_clamps_with(TensorClampSte, int_quant)


def _rounds_and_clamps_with(clamp: type, int_quant: nn.Module) -> bool:
    return (type(int_quant) in (IntQuant, FusedIntQuant) and type(int_quant.float_to_int_impl) is RoundSte
            and type(int_quant.tensor_clamp_impl) is clamp and type(int_quant.input_view_impl) is Identity
            and type(int_quant.delay_wrapper.delay_impl) is _NoDelay)
