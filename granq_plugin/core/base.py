"""What all GranQ quantizers share."""

from brevitas.core.bit_width import BitWidthConst
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin.kernels import Before

__all__ = ["ActClamp", "GranQBase"]


class GranQBase(nn.Module):
    """What Brevitas's proxies, graph mode (residual alignment) and handlers read off every quantizer, under Brevitas's names.

    Args:
        int_quant: Brevitas's IntQuant. int_scaling_impl: Brevitas's, only kept reachable.
        bit_width: k, from 1 to 16.

    Raises:
        ValueError: if int_quant is signed and the quantizer always asymmetric (``symmetric`` False), or has a narrow range and is
            unsigned.
    """
    symmetric = True

    def __init__(self, int_quant: nn.Module, int_scaling_impl: nn.Module, bit_width: int) -> None:
        super().__init__()
        if int_quant.signed and not self.symmetric:
            raise ValueError(f"{type(self).__name__} has asymmetric ranges and unsigned integers; signed=True is not for it")
        if int_quant.narrow_range and not int_quant.signed:
            raise ValueError("narrow_range=True needs signed=True; with signed=False, give narrow_range=False too")
        self.bit_width = GF.check_bit_width(bit_width)
        self.int_quant = int_quant
        self.int_scaling_impl = int_scaling_impl
        self.msb_clamp_bit_width_impl = BitWidthConst(self.bit_width)
        self.observer_only = False

    @property
    def bits(self) -> Tensor:
        """The bit width as Brevitas keeps it, a 0-d float tensor."""
        return self.msb_clamp_bit_width_impl.bit_width.value  # its forward() costs as much as a small quantization


class ActClamp(nn.Module):
    """Clamp to ``[min_val, max_val]``, either of which may be None: Brevitas leaves the clamping of HardTanh and of
    ``QuantReLU(max_val=6.)`` to the quantizer, and a range that follows the data does not do it."""

    def __init__(self, min_val: float | None, max_val: float | None) -> None:
        super().__init__()
        self.min_val, self.max_val = min_val, max_val

    def after(self, relu: bool) -> Before:
        """This clamp, after a ReLU if there is one."""
        return Before(relu, self.min_val, self.max_val)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(False).apply(x)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"
