"""Brevitas proxies that return a :class:`~granq_plugin.core.quant_tensor.PerChannelQuantTensor`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from brevitas.nn.mixin.parameter import QuantWeightMixin
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import DynamicActQuantProxyFromInjector
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from granq_plugin.core.quant_tensor import PerChannelQuantTensor
from granq_plugin.kernels import Ahead

__all__ = ["FusedActivation", "GranQActProxy", "GranQDynamicActProxy", "GranQStaticActProxy", "GranQPerKernelWeightProxy",
           "GranQWeightProxy", "has_hooks", "is_watched"]


_ON_THE_WAY = threading.local()


class FusedActivation(nn.Module):
    """Brevitas's FusedActivationQuantProxy without TorchScript, which our quantizers do not need and cannot have."""

    def __init__(self, activation_impl: nn.Module, tensor_quant: nn.Module) -> None:
        super().__init__()
        self.activation_impl = activation_impl
        self.tensor_quant = tensor_quant

    @contextmanager
    def after(self, ahead: Ahead) -> Iterator[None]:
        """The next forward in this thread does a BatchNorm (and an addition) first, and that forward alone: handed past Brevitas's
        layers, which pass on one tensor."""
        _ON_THE_WAY.ahead = self, ahead
        try:
            yield
        finally:
            _ON_THE_WAY.ahead = None, None

    def forward(self, x: Tensor):
        meant, ahead = getattr(_ON_THE_WAY, "ahead", (None, None))
        if meant is self:
            _ON_THE_WAY.ahead = None, None
        else:
            ahead = None
        activation, quantizer = self.activation_impl, self.tensor_quant
        if self.fuses():
            return quantizer(x, type(activation) is nn.ReLU, ahead)
        return quantizer(activation(x if ahead is None else ahead.apply(x)))

    def fuses(self) -> bool:
        """Whether the quantizer can do the activation too, and no hook wants to see what lies between."""
        activation, quantizer = self.activation_impl, self.tensor_quant
        return (type(activation) in (nn.ReLU, nn.Identity) and getattr(quantizer, "fuses", False)
                and not (has_hooks(activation) or has_hooks(quantizer)))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody sees what goes through modules: by hooks, or forwards put into their place."""
    return _has_any_global_hook() or any(has_hooks(m) or "forward" in vars(m) for m in modules)


class GranQActProxy(ActQuantProxyFromInjector):
    """What the dynamic and the static activation proxy share."""

    def __init__(self, quant_layer: nn.Module, quant_injector) -> None:
        # the base class builds the activation before it tells the injector the layer, from which HardTanh's limits come
        super().__init__(quant_layer, quant_injector.let(module=quant_layer))

    def init_tensor_quant(self) -> None:
        act_impl = self.quant_injector.act_impl if "act_impl" in self.quant_injector else None
        if act_impl is None or isinstance(act_impl, nn.Hardtanh):  # its clamp is the quantizer's
            act_impl = nn.Identity()
        previous = getattr(self, "fused_activation_quant_proxy", None)
        self.fused_activation_quant_proxy = FusedActivation(act_impl, self.quant_injector.tensor_quant)
        if previous is not None:  # rebuilt, e.g. by load_state_dict: stay on the device
            self.fused_activation_quant_proxy.to(next(previous.buffers()).device)
        self.is_quant_enabled = True

    def create_quant_tensor(self, qt_args, x) -> QuantTensor:
        if isinstance(qt_args, tuple):
            return PerChannelQuantTensor(*qt_args, self.is_signed, self.training)
        return x.set(value=qt_args)  # quantization disabled: pass the input's metadata on


class GranQDynamicActProxy(GranQActProxy, DynamicActQuantProxyFromInjector):
    """Proxy of :class:`~granq_plugin.core.dynamic.DynamicGranQ`: it has a bit width, but no scale of its own."""


class GranQStaticActProxy(GranQActProxy):
    """Proxy of :class:`~granq_plugin.core.static.StaticGranQ`.

    ``scale()`` and ``zero_point()`` return tensors ``[1, C, 1, ...]``; they raise a RuntimeError before any range is known.
    """

    def retrieve_attribute(self, attribute, force_eval):
        if attribute in ("scale", "zero_point") and self.is_quant_enabled:
            self.fused_activation_quant_proxy.tensor_quant.scaling_impl.check_has_ranges()
        return super().retrieve_attribute(attribute, force_eval)


class _WeightProxy(WeightQuantProxyFromInjector):
    """Brevitas's, which fails without a word about the reason where a layer has no weights."""

    def __init__(self, quant_layer: nn.Module, quant_injector) -> None:
        if not isinstance(quant_layer, QuantWeightMixin):
            raise TypeError(f"{type(quant_layer).__name__} takes an activation quantizer, such as GranQActPerChannel; got one of "
                            "weights")
        super().__init__(quant_layer, quant_injector)


class GranQWeightProxy(_WeightProxy):
    """Proxy of :class:`~granq_plugin.core.weight.MinMaxWeightQuant`; a type of its own, because handlers go by type."""


class GranQPerKernelWeightProxy(_WeightProxy):
    """Proxy of :class:`~granq_plugin.core.weight.PerKernelGranQ`."""

    def create_quant_tensor(self, qt_args) -> PerChannelQuantTensor:
        return PerChannelQuantTensor(*qt_args, self.is_signed, self.training)
