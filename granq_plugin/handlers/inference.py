"""Handlers for Brevitas's ``quant_inference_mode``: the same values as outside of it, bit for bit."""

from brevitas.export.inference.handler import DynamicIntInferenceHandler, IntInferenceHandler, IntWeightInferencetHandler
from torch import Tensor, nn

from granq_plugin.core.proxy import GranQDynamicActProxy, GranQPerKernelWeightProxy, GranQStaticActProxy, GranQWeightProxy

__all__ = ["HANDLERS", "GranQDynamicInferenceHandler", "GranQStaticInferenceHandler", "GranQWeightInferenceHandler"]


class GranQDynamicInferenceHandler(DynamicIntInferenceHandler):
    """Ranges follow the input in inference mode too."""
    handled_layer = GranQDynamicActProxy


class GranQStaticInferenceHandler(IntInferenceHandler):
    """Frozen scale and zero point as buffers; the clamp of HardTanh and ReLU6 is kept."""
    handled_layer = GranQStaticActProxy

    def prepare_for_export(self, module: nn.Module) -> None:
        super().prepare_for_export(module)
        self.clamp = module.fused_activation_quant_proxy.tensor_quant.clamp

    def forward(self, x: Tensor, unused_scale: Tensor | None = None):
        value, *metadata = super().forward(self.clamp(x))
        return value.to(x.dtype), *metadata


class GranQWeightInferenceHandler(IntWeightInferencetHandler):
    """The quantizer itself: its formula (per kernel), and its way back to half precision, are not Brevitas's."""
    handled_layer = (GranQWeightProxy, GranQPerKernelWeightProxy)

    def prepare_for_export(self, module: nn.Module) -> None:
        super().prepare_for_export(module)
        self.tensor_quant = module.tensor_quant

    def inner_forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self.tensor_quant(x)[0]


HANDLERS = (GranQDynamicInferenceHandler, GranQStaticInferenceHandler, GranQWeightInferenceHandler)
