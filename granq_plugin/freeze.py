"""Weights as the integers that they are, :func:`freeze_weights`, or quantized once for many forwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from granq_plugin import functional as GF
from granq_plugin.core.frozen import FrozenMinMaxWeightQuant, FrozenPerKernelGranQ, FrozenWeightQuant
from granq_plugin.core.proxy import GranQPerKernelWeightProxy, GranQWeightProxy, has_hooks
from granq_plugin.modules import check_module, copy_model

__all__ = ["freeze_weights", "frozen_layers", "use_frozen_quantizers", "weights_quantized_once"]


def freeze_weights(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Put the quantized values in the place of every weight that a GranQ quantizer quantizes, and keep its scales as buffers.

    GranQ's weight quantizers compute their ranges from the weight at every forward, and the ranges of a quantized weight need not
    be those that it was quantized with. A frozen quantizer has the scale and zero point as data, in the state dict: the outputs
    are bit-identical to the model's, the weights are integers times a scale, and every export works as before.

    In the per-kernel regime, weights stay in float and their quantizer is switched off where kernels have one value (1x1
    convolutions), which that regime leaves unquantized in effect, or where no grid gives the values back.

    Args:
        model: a model with GranQ weight quantizers, float32. inplace: change ``model`` itself; otherwise a deep copy.

    Returns:
        The model in evaluation mode or training mode, as it was.

    Raises:
        ValueError: names the layer, if its weight is computed from others (``fold(..., trainable=True)``: bake it first), is not
            float32 or not finite, has a quantizer in common with another weight, or is another layer's weight too, which
            stays float or is quantized to other values; if there is nothing to freeze.

    Example:
        >>> from granq_plugin import quantize
        >>> frozen = freeze_weights(quantize(nn.Sequential(nn.Linear(64, 1), nn.ReLU()), weight_bit_width=2, act_bit_width=4))
        >>> frozen[0].weight.unique().numel()  # 2 bits
        4
    """
    check_module(model)
    model = model if inplace else copy_model(model)
    layers = _quantized_layers(model)
    if not layers:
        raise ValueError("model has no GranQ weight quantizer to freeze, or is frozen already")
    for name, layer in layers.items():
        _check(name, layer)
    quantized = {name: _quantized(layer) for name, layer in layers.items()}
    _check_tied(model, layers, quantized)
    for name, layer in layers.items():
        _freeze(name, layer, *quantized[name])
    return model


def use_frozen_quantizers(model: nn.Module, float_layers: frozenset[str] = frozenset()) -> None:
    """Give ``model``, in place, the quantizers of a frozen one, still without scales: for a state dict that brings them.

    Args:
        float_layers: names of the layers whose weight stays in float.
    """
    for name, layer in _quantized_layers(model).items():
        if name in float_layers:
            layer.weight_quant.disable_quant = True
        else:
            _swap(layer.weight_quant)


def frozen_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a frozen weight quantizer, by name."""
    return {name: m for name, m in model.named_modules()
            if isinstance(getattr(getattr(m, "weight_quant", None), "tensor_quant", None), FrozenWeightQuant)}


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Within it, layers in evaluation mode use the weights that they have now, quantized once, without gradients.

    Brevitas quantizes a layer's weight at every forward, which is most of what Python and a GPU's launches have to do in small
    networks. Layers whose weights are quantized by their input, or with hooks on their quantizer, go on as they did.

    Args:
        model: any. Meanwhile its weights, mode, device, dtype and quantizers must not change, and it must not be copied: a copy
            would keep the weights for good. They are held beside the float ones.

    Example:
        >>> import granq_plugin as gq
        >>> quantized = gq.quantize(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), weight_bit_width=2, act_bit_width=4).eval()
        >>> with weights_quantized_once(quantized):
        ...     quantized(torch.ones(1, 4)).shape, quantized(torch.zeros(1, 4)).shape
        (torch.Size([1, 2]), torch.Size([1, 2]))
    """
    check_module(model)
    held = []
    try:
        for layer in model.modules():
            if isinstance(layer, QuantWeightBiasInputOutputLayer) and _holds(layer):
                with torch.no_grad():
                    weight = layer.quant_weight()
                layer.quant_weight = lambda quant_input=None, weight=weight: weight
                held.append(layer)
        yield
    finally:
        for layer in held:
            vars(layer).pop("quant_weight", None)  # another thread in here may have let go


def _holds(layer: QuantWeightBiasInputOutputLayer) -> bool:
    proxy = layer.weight_quant
    return (proxy.is_quant_enabled and not (layer.training or proxy.training or proxy.requires_quant_input or layer.export_mode)
            and "quant_weight" not in vars(layer) and not any(map(has_hooks, proxy.modules())))


def _quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    frozen = frozen_layers(model)
    return {name: m for name, m in model.named_modules()
            if isinstance(getattr(m, "weight_quant", None), (GranQWeightProxy, GranQPerKernelWeightProxy))
            and m.weight_quant.is_quant_enabled and name not in frozen}


def _check(name: str, layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"cannot freeze '{name}': its weight is computed from other parameters; bake() the model first")
    if layer.weight.dtype != torch.float32 or not torch.isfinite(layer.weight).all():
        raise ValueError(f"cannot freeze '{name}': its weight must be finite float32, got {layer.weight.dtype}")
    if any(m.weight is not layer.weight for m in layer.weight_quant.tracked_module_list):
        raise ValueError(f"cannot freeze '{name}': its weight quantizer is also another weight's; give each its own")


@torch.no_grad()
def _quantized(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The quantized weight, and what a frozen quantizer keeps of its own."""
    quantizer, weight = layer.weight_quant.tensor_quant, layer.weight
    value, scale, zero_point, _ = quantizer(weight)
    if isinstance(layer.weight_quant, GranQPerKernelWeightProxy):  # it divides by s, whose reciprocal is rounded
        scale, zero_point = GF.inverse_scale(*GF.channel_range(weight), quantizer.bit_width)
    return value, scale, zero_point


def _check_tied(model: nn.Module, layers: dict[str, nn.Module], quantized: dict[str, tuple]) -> None:
    """Layers that share a weight agree in what it becomes, and nobody else has it."""
    first = {}
    names = {layer.weight: name for name, layer in layers.items()}
    for other, m in model.named_modules():
        for parameter in m._parameters.values():
            if parameter in names and other not in layers:
                raise ValueError(f"cannot freeze '{names[parameter]}': its weight is also that of '{other}', which stays float")
    for name, layer in layers.items():
        other = first.setdefault(layer.weight, name)
        if not torch.equal(quantized[other][0], quantized[name][0]):
            raise ValueError(f"cannot freeze '{name}': its weight is also that of '{other}', which quantizes it to other values")


def _swap(proxy: nn.Module) -> FrozenWeightQuant:
    """A frozen quantizer, without scales, in the place of the proxy's; through the injector, so that it survives a reload."""
    like = next(m.weight for m in proxy.tracked_module_list)
    kind = FrozenPerKernelGranQ if isinstance(proxy, GranQPerKernelWeightProxy) else FrozenMinMaxWeightQuant
    proxy.quant_injector = proxy.quant_injector.let(tensor_quant=kind)
    proxy.init_tensor_quant()
    proxy.tensor_quant.to(like.device).train(proxy.training)
    return proxy.tensor_quant


@torch.no_grad()
def _freeze(name: str, layer: nn.Module, value: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    proxy, weight = layer.weight_quant, layer.weight
    old, per_kernel = proxy.tensor_quant, isinstance(proxy, GranQPerKernelWeightProxy)
    frozen = _swap(proxy)
    frozen.set(scale, zero_point)
    weight.copy_(value)
    integers = frozen.to_int(value)
    exact = torch.equal(frozen.dequantize(integers), value) and torch.equal(frozen(value)[0], value)
    one_value = per_kernel and weight.dim() > 2 and weight[0, 0].numel() == 1
    if exact and not one_value and int(integers.max()) - frozen.lowest <= 2**frozen.bit_width:
        return
    if not per_kernel:
        raise ValueError(f"cannot freeze '{name}': its quantized weight is not on its own grid")
    proxy.quant_injector = proxy.quant_injector.let(tensor_quant=type(old))
    proxy.init_tensor_quant()
    proxy.disable_quant = True
