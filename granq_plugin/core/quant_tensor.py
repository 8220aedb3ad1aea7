"""The QuantTensor that per-channel quantizers return."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from brevitas.quant_tensor import QuantTensor, _unpack_quant_tensor
from brevitas.quant_tensor.base_quant_tensor import IntMixin
from torch import Tensor

__all__ = ["PerChannelQuantTensor"]


class _PerChannelQuantTensorBase(NamedTuple):
    value: Tensor
    scale: Tensor
    zero_point: Tensor
    bit_width: Tensor
    signed: bool
    training: bool


class PerChannelQuantTensor(_PerChannelQuantTensorBase, IntMixin, QuantTensor):
    """A dequantized value with the per-channel scale and zero point that made it.

    Brevitas's ``IntQuantTensor`` assumes one scale: with one per channel it crashes in a convolution, or, where input and output
    channels are equally many, silently computes a wrong output scale (and from it a wrong quantized bias). This type keeps its
    metadata only through operations after which every value still lies on its own channel's grid (max pooling, ReLU, nearest
    interpolation) and is a plain ``Tensor`` after all others: convolution, linear, add, cat, reshape, average pooling.
    Model: Brevitas's ``GroupwiseIntQuantTensor``.

    Attributes:
        value: ``[B, C, *spatial]``, dequantized.
        scale, zero_point: broadcastable to value, e.g. ``[B, C, 1, 1]`` (dynamic) or ``[1, C, 1, 1]`` (static).
        bit_width: 0-d tensor. signed, training: bool.

    Note:
        ``int()`` raises for a channel whose integers the value cannot give back: one whose magnitude is large against its range,
        and one at the paper's tie (see :func:`granq_plugin.functional.granq`).

    Note:
        A stock layer with ``act_quant=None`` rebuilds an ``IntQuantTensor`` from any QuantTensor that it is given; hand such a
        layer ``x.value``.
    """

    @property
    def tensor(self) -> Tensor:
        return self.value

    @property
    def signed_t(self) -> Tensor:  # IntMixin.int() reads this one
        return torch.tensor(self.signed)

    @property
    def device(self) -> torch.device:
        return self.value.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = args[0] if args else None
        out = func(*_unpack_quant_tensor(args), **_unpack_quant_tensor(kwargs))
        if func in _GRID_PRESERVING and isinstance(source, cls) and isinstance(out, Tensor):
            return source._on_same_grid(out, func, kwargs)
        return out

    def _on_same_grid(self, out: Tensor, func, kwargs):
        if func is F.interpolate and kwargs.get("mode", "nearest") not in ("nearest", "nearest-exact"):
            return out
        broadcastable = out.dim() == self.value.dim() and all(
            s in (1, n) for s, n in zip(self.scale.shape, out.shape))
        if not broadcastable:
            return out
        if func in (F.relu, torch.relu) and not self.signed:
            # 0 lies beyond the levels of a channel that was all negative: now all 0, it is on the grid of any zero point
            return self.set(value=out, zero_point=self.zero_point.clamp_max(2.0**self.bit_width - 1))
        return self.set(value=out)

    # NamedTuple and IntMixin bring their own versions of these; a per-channel scale survives none of them
    def __add__(self, other):
        return self.value + _unpack_quant_tensor(other)

    __radd__ = __add__

    def __sub__(self, other):
        return self.value - _unpack_quant_tensor(other)

    def __rsub__(self, other):
        return _unpack_quant_tensor(other) - self.value

    def __mul__(self, other):
        return self.value * _unpack_quant_tensor(other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self.value / _unpack_quant_tensor(other)

    def __rtruediv__(self, other):
        return _unpack_quant_tensor(other) / self.value

    def __pow__(self, exponent):
        return self.value**_unpack_quant_tensor(exponent)

    def __getitem__(self, key) -> Tensor:
        return self.value[key]

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.value, name)  # dtype, mean(), sum()...: those of the plain tensor

    def __neg__(self):
        return -self.value

    def __abs__(self):
        return self.value.abs()

    def view(self, *args, **kwargs) -> Tensor:
        return self.value.view(*args, **kwargs)

    def reshape(self, *args, **kwargs) -> Tensor:
        return self.value.reshape(*args, **kwargs)

    def flatten(self, *args, **kwargs) -> Tensor:
        return self.value.flatten(*args, **kwargs)

    def transpose(self, *args, **kwargs) -> Tensor:
        return self.value.transpose(*args, **kwargs)

    def permute(self, *args, **kwargs) -> Tensor:
        return self.value.permute(*args, **kwargs)


# The functional pools dispatch to the torch ones before they reach __torch_function__, so both names are listed.
_GRID_PRESERVING = {
    torch.relu, F.relu, F.interpolate,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
}  # yapf: disable
