"""Handlers for Brevitas's ONNX and torch managers: what each of our quantizers becomes in a file.

============  ==============================  ==============================  =========================
quantizer     QONNX                           ONNX QCDQ                       torch QCDQ
============  ==============================  ==============================  =========================
weights       float weight, Quant             integers, DequantizeLinear      integers, ``(q - z) * s``
per-kernel    float constant                  float constant                  float constant
static        Quant                           QuantizeLinear, Clip,           Round, clamp, ``(q - z) * s``
                                              DequantizeLinear
dynamic       standard operators              standard operators              standard operators
============  ==============================  ==============================  =========================

All of them compute the values of the torch model bit for bit. Three stock forms are left out, because they do not: QuantizeLinear
with a zero point (it rounds before it adds the zero point, so ties and values beside them differ), torch's ``quantize_per_channel``
(it multiplies by a rounded reciprocal) and BipolarQuant for 1 bit (our 1-bit levels are 0 and 1, not -1 and 1).
"""

import contextlib
import warnings

import torch
from brevitas.export.common import to_0dim_if_scalar
from brevitas.export.common.handler.base import BaseHandler, QuantAxisMixin
from brevitas.export.onnx.handler import ONNXExportOpMixin
from brevitas.export.onnx.qonnx.function import BrevitasQuantOp
from brevitas.export.onnx.standard.function import DequantizeLinearOp, IntClipOp, QuantizeLinearOp
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin.core.proxy import GranQDynamicActProxy, GranQPerKernelWeightProxy, GranQStaticActProxy, GranQWeightProxy

__all__ = ["QCDQ_HANDLERS", "QONNX_HANDLERS", "TORCH_HANDLERS"]


class _Handler(BaseHandler):
    """Brevitas calls ``prepare_for_export`` with the proxy, and then the handler in the quantizer's place while it traces."""

    def prepare_for_export(self, module: nn.Module) -> None:
        if module.is_quant_enabled:  # one that is switched off is not called either
            self.prepare(module)

    def prepare(self, module: nn.Module) -> None:
        """Keep what ``forward`` needs of an enabled quantizer's proxy."""
        self.signed, self.narrow = module.is_signed, module.is_narrow_range
        self.bit_width = module.bit_width().detach()
        self.bits = int(self.bit_width)  # a number: the dynamo exporter cannot branch on a tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(value, scale, zero_point, bit_width)``, as the quantizer returns them."""
        raise NotImplementedError


class DynamicHandler(_Handler):
    """The formula as standard operators; what :func:`granq_plugin.functional.granq` computes, without its gradient."""
    handled_layer = GranQDynamicActProxy

    def prepare(self, module: nn.Module) -> None:
        super().prepare(module)
        quantizer = module.fused_activation_quant_proxy.tensor_quant
        self.channel_axis, self.clamp = quantizer.channel_axis, [quantizer.clamp]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.clamp[0](x)
        with warnings.catch_warnings() if torch.jit.is_tracing() else contextlib.nullcontext():
            if torch.jit.is_tracing():  # the check for an empty batch becomes a constant, as it should
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
            inv_scale, offset = GF.inverse_scale(*GF.channel_range(x, self.channel_axis), self.bits)
        value = ((x * inv_scale - offset).round() + offset) / inv_scale
        if value.dtype != x.dtype:  # asked, because the older exporter writes a Cast in any case
            value = value.to(x.dtype)
        return value, inv_scale.reciprocal(), 0 - offset, self.bit_width


class _StaticHandler(_Handler):
    """Frozen (or so far collected) scale and zero point, as constants."""
    handled_layer = GranQStaticActProxy

    def prepare(self, module: nn.Module) -> None:
        super().prepare(module)
        quantizer = module.fused_activation_quant_proxy.tensor_quant
        self.clamp, self.ranges = [quantizer.clamp], [quantizer.scaling_impl]  # in lists: not submodules of a second module
        self.scale = module.scale().detach()
        self.zero_point = _scalar_if_all_zero(module.zero_point().detach())
        self.limits = GF.integer_limits(self.bits, self.signed, self.narrow)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, zero_point = self.scale, self.zero_point
        if scale.dim() != x.dim():  # collected on tensors with another number of spatial axes
            shape = self.ranges[0]._range_shape(x)
            scale, zero_point = scale.view(shape), zero_point if zero_point.dim() == 0 else zero_point.view(shape)
        value = self.fake_quantize(self.clamp[0](x), scale, zero_point)
        return value, scale, zero_point, self.bit_width

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        raise NotImplementedError


class _WeightHandler(_Handler):
    """Weights that are quantized once, here. A proxy that several layers share quantizes each layer's weight by itself."""

    def prepare(self, module: nn.Module) -> None:
        super().prepare(module)
        quantizer = module.tensor_quant
        weights = [m.weight.detach() for m in module.tracked_module_list]
        self.constants = {w.data_ptr(): self.quantized(quantizer, w) for w in weights}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # the dynamo exporter's tensors have no address, but a weight of its own needs none
        constants = next(iter(self.constants.values())) if len(self.constants) == 1 else self.constants[x.data_ptr()]
        return self.weight(x, *constants)

    def quantized(self, quantizer: nn.Module, weight: Tensor) -> tuple[Tensor, ...]:
        """What is kept of a weight: its integers, scale and zero point."""
        _, scale, zero_point, bit_width = quantizer(weight)
        integers = quantizer.int_quant.to_int(scale, zero_point, bit_width, weight)
        return integers, scale, _scalar_if_all_zero(zero_point)

    def weight(self, x: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError


class PerKernelWeightHandler(_WeightHandler):
    """The fake-quantized weight as a float constant: no format has a scale per kernel."""
    handled_layer = GranQPerKernelWeightProxy

    def quantized(self, quantizer: nn.Module, weight: Tensor) -> tuple[Tensor, ...]:
        return quantizer(weight)[:3]

    def weight(self, x: Tensor, value: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return value, scale, zero_point, self.bit_width


class _Quant(ONNXExportOpMixin):
    """QONNX's Quant; not BipolarQuant at 1 bit."""

    def quant(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self.export_op(BrevitasQuantOp, x, scale, zero_point, self.bit_width, self.narrow, self.signed, "ROUND")


class QONNXStaticHandler(_Quant, _StaticHandler):

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self.quant(x, scale, zero_point)


class QONNXWeightHandler(_Quant, _WeightHandler):
    handled_layer = GranQWeightProxy

    def weight(self, x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.quant(x, scale, zero_point), scale, zero_point, self.bit_width


class _QuantizeLinear(ONNXExportOpMixin, QuantAxisMixin):
    """QuantizeLinear and DequantizeLinear hold 8 bits (more need opset 21, which the older exporter does not write)."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def clip(self, integers: Tensor) -> Tensor:
        """To the levels of less than 8 bits. On weights it changes nothing, but says how many bits they have."""
        info, limits = torch.iinfo(self.dtype), GF.integer_limits(self.bits, self.signed, self.narrow)
        if limits == (info.min, info.max):
            return integers
        limits = (torch.full((), limit, dtype=self.dtype, device=integers.device) for limit in limits)
        return self.export_op(IntClipOp, integers, *limits)

    def dequantize(self, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        flat = to_0dim_if_scalar(scale.flatten())
        zero_point = to_0dim_if_scalar(zero_point.flatten()).expand_as(flat).to(integers.dtype)
        return self.export_op(DequantizeLinearOp, integers, flat, zero_point, self.quant_axis(scale))


class QCDQStaticHandler(_QuantizeLinear, _StaticHandler):

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.bits > 8:
            return (_round_to_int(x, scale, zero_point, self.limits) - zero_point) * scale
        unit = scale.new_ones(())
        if zero_point.dim() == 0:
            flat, axis = to_0dim_if_scalar(scale.flatten()), self.quant_axis(scale)
        else:  # the zero point is added before the rounding, as Brevitas does it
            x, flat, axis = x / scale + zero_point, unit, None
        zeros = torch.zeros_like(flat, dtype=self.dtype)
        integers = self.export_op(QuantizeLinearOp, x, flat, zeros, self.dtype, axis)
        return self.dequantize(self.clip(integers), scale, zero_point)


class QCDQWeightHandler(_QuantizeLinear, _WeightHandler):
    handled_layer = GranQWeightProxy

    def weight(self, x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.bits > 8:  # int32 has no zero point in ONNX
            value = self.dequantize((integers - zero_point).to(torch.int32), scale, torch.zeros_like(zero_point))
        else:
            value = self.dequantize(self.clip(integers.to(self.dtype)), scale, zero_point)
        return value, scale, zero_point, self.bit_width


class TorchStaticHandler(_StaticHandler):

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (_round_to_int(x, scale, zero_point, self.limits) - zero_point) * scale


class TorchWeightHandler(_WeightHandler):
    handled_layer = GranQWeightProxy

    def weight(self, x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stored = integers.to(torch.int32 if self.bits > 8 else torch.int8 if self.signed else torch.uint8)
        return (stored - zero_point) * scale, scale, zero_point, self.bit_width


def _round_to_int(x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int]) -> Tensor:
    """Brevitas's ``IntQuant.to_int`` without its straight-through estimators."""
    return torch.round(x / scale + zero_point).clamp(*limits)


def _scalar_if_all_zero(zero_point: Tensor) -> Tensor:
    """qonnx's QuantToQCDQ and FINN compare the zero point to 0 as a single number."""
    return zero_point.new_zeros(()) if not zero_point.any() else zero_point


QONNX_HANDLERS = (DynamicHandler, PerKernelWeightHandler, QONNXStaticHandler, QONNXWeightHandler)
QCDQ_HANDLERS = (DynamicHandler, PerKernelWeightHandler, QCDQStaticHandler, QCDQWeightHandler)
TORCH_HANDLERS = (DynamicHandler, PerKernelWeightHandler, TorchStaticHandler, TorchWeightHandler)
