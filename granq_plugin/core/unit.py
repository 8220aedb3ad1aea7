"""Folded activations: stock Brevitas layers whose integers have the constant scale 1, in one kernel with what is ahead of them."""

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.scaling import ConstScaling
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector, FusedActivationQuantProxy
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin import kernels
from granq_plugin.core.int_quant import FusedIntQuant, has_stock_arithmetic
from granq_plugin.core.proxy import is_watched

__all__ = ["UnitActivation"]


class UnitActivation:
    """What such a layer computes, without the modules that Brevitas computes it with: the same values and gradients.

    Args:
        layer: a Brevitas activation layer for which :meth:`suits` holds.
    """

    def __init__(self, layer: QuantNonLinearActLayer) -> None:
        self.layer, proxy = layer, layer.act_quant
        self.modules, self.buffers = tuple(proxy.modules()), tuple(proxy.buffers())  # kept, so that ids are not used again
        self.state = _state(self.modules)
        self.quantizer = proxy.fused_activation_quant_proxy.tensor_quant
        self.before = kernels.Before(relu=type(proxy.fused_activation_quant_proxy.activation_impl) is nn.ReLU)
        int_quant, bit_width = self.quantizer.int_quant, self.quantizer.msb_clamp_bit_width_impl()
        self.limits = GF.integer_limits(int(bit_width), int_quant.signed, int_quant.narrow_range)

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is one of these, and nobody looks into it."""
        proxy = getattr(layer, "act_quant", None)
        fused = getattr(proxy, "fused_activation_quant_proxy", None)
        quantizer = getattr(fused, "tensor_quant", None)
        return (isinstance(layer, QuantNonLinearActLayer) and type(proxy) is ActQuantProxyFromInjector
                and type(fused) is FusedActivationQuantProxy and type(fused.activation_impl) in (nn.ReLU, nn.Identity)
                and type(quantizer) is RescalingIntQuant and type(quantizer.int_quant) is FusedIntQuant
                and has_stock_arithmetic(quantizer.int_quant) and type(quantizer.scaling_impl) is ConstScaling
                and type(quantizer.zero_point_impl) is ZeroZeroPoint and type(quantizer.msb_clamp_bit_width_impl) is BitWidthConst
                and not is_watched(*proxy.modules()) and proxy.is_quant_enabled and _scale_is_one(quantizer))

    def serves(self, x: Tensor) -> bool:
        """Whether the layer still is what it was, and a kernel may take its place for x."""
        proxy = self.layer.act_quant
        return (not (kernels.is_observed() or self.layer.return_quant_tensor or self.quantizer.observer_only
                     or proxy.cache_inference_quant_act)
                and x.is_cpu and x.dtype == torch.float32 and _state(self.modules) == self.state and not is_watched(*self.modules))

    def __call__(self, x: Tensor, ahead: kernels.Ahead) -> Tensor:
        """The integers of ``ahead``'s values, as floats."""
        scale = x.new_ones([n if d == 1 else 1 for d, n in enumerate(x.shape)])  # kernels know BatchNorm per channel only
        return kernels.affine_quantize(x, scale, torch.zeros_like(scale), self.limits, 1, self.before, ahead)


def _state(modules: tuple[nn.Module, ...]) -> list[list]:
    """Their parts, which another bit width or state dict replaces, and how often the constants among them were written to."""
    def constants(module: nn.Module) -> list[tuple]:
        return [(id(b), 0 if b.is_inference() else b._version) for b in module._buffers.values() if b is not None]
    return [[*map(id, m._modules.values()), *constants(m)] for m in modules]


@torch.no_grad()
def _scale_is_one(quantizer: RescalingIntQuant) -> bool:
    bit_width = quantizer.msb_clamp_bit_width_impl()
    scale = quantizer.scaling_impl(bit_width.new_zeros(()), quantizer.int_scaling_impl(bit_width))
    return scale.numel() == 1 and not scale.is_meta and scale.item() == 1
