"""Weight quantizers whose scales are data, not recomputed from the weight: what a packed or exported weight is rebuilt with."""

import torch
from brevitas import config
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin.core.base import GranQBase

__all__ = ["FrozenMinMaxWeightQuant", "FrozenPerKernelGranQ", "FrozenWeightQuant"]


class FrozenWeightQuant(GranQBase):
    """What both kinds share: float32 buffers that start empty and take their shape from a state dict or :meth:`set`."""
    BUFFERS: tuple[str, str]

    def __init__(self, int_quant: nn.Module, int_scaling_impl: nn.Module, bit_width: int) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width)
        for name in self.BUFFERS:
            self.register_buffer(name, torch.empty(0))

    def set(self, *values: Tensor) -> None:
        """Take the buffers' values, broadcastable to the weight."""
        for name, value in zip(self.BUFFERS, values):
            self.register_buffer(name, value.detach().to(torch.float32).clone())

    def params(self) -> list[Tensor]:
        """The buffers. Raises a RuntimeError if they have not been set or loaded."""
        values = [getattr(self, name) for name in self.BUFFERS]
        if not values[0].numel():
            raise RuntimeError("frozen weight quantizer has no scale yet: load the state dict that it was saved in")
        return values

    @property
    def lowest(self) -> int:
        """The lowest integer."""
        return 0

    def to_int(self, x: Tensor) -> Tensor:
        """The integers of a weight, int64, from :attr:`lowest` up."""
        raise NotImplementedError

    def dequantize(self, integers: Tensor) -> Tensor:
        """The weight of integers, float32: the very values that the quantizer which was frozen returned for them."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        for name in self.BUFFERS:
            if prefix + name in state_dict:
                self.register_buffer(name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if config.IGNORE_MISSING_KEYS:
            missing_keys[:] = [k for k in missing_keys if not k.startswith(prefix)]


class FrozenMinMaxWeightQuant(FrozenWeightQuant):
    """:class:`~granq_plugin.core.weight.MinMaxWeightQuant` with the scale and zero point that it had.

    Args:
        int_quant, int_scaling_impl, bit_width: see :class:`~granq_plugin.core.base.GranQBase`. signed: as there.

    Returns:
        ``(value, scale, zero_point, bit_width)``. Values on the grid come back bit-identical.
    """
    BUFFERS = ("scale", "zero_point")

    def __init__(self, int_quant: nn.Module, int_scaling_impl: nn.Module, bit_width: int, signed: bool) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width)
        self.signed = signed

    @property
    def lowest(self) -> int:
        return GF.integer_limits(self.bit_width, self.signed)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, zero_point = self.params()
        bit_width = self.bits
        return self.int_quant(scale, zero_point, bit_width, x).to(x.dtype), scale, zero_point, bit_width

    def to_int(self, x: Tensor) -> Tensor:
        return self.int_quant.to_int(*self.params(), self.bits, x).long()

    def dequantize(self, integers: Tensor) -> Tensor:
        scale, zero_point = self.params()
        return (integers.to(scale) - zero_point) * scale


class FrozenPerKernelGranQ(FrozenWeightQuant):
    """:class:`~granq_plugin.core.weight.PerKernelGranQ` with the s and z (``inv_scale``, ``offset``) that it had."""
    BUFFERS = ("inv_scale", "offset")
    symmetric = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inv_scale, offset = self.params()
        return GF.fake_quantize(x, inv_scale, offset), inv_scale.reciprocal(), 0 - offset, self.bits

    def to_int(self, x: Tensor) -> Tensor:
        inv_scale, offset = self.params()
        return (x * inv_scale - offset).round().long()

    def dequantize(self, integers: Tensor) -> Tensor:
        inv_scale, offset = self.params()
        return (integers.to(inv_scale) + offset) / inv_scale
