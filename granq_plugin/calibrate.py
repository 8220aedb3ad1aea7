"""From dynamic to static ranges: :func:`to_static`."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from brevitas.graph.calibrate import calibration_mode
from torch import Tensor, nn

from granq_plugin.core.proxy import GranQDynamicActProxy, GranQStaticActProxy
from granq_plugin.core.ranges import CollectedRange
from granq_plugin.modules import check_module, copy_model
from granq_plugin.quantizers import GranQActPerChannelStatic, check_quantizer

__all__ = ["to_static"]


def to_static(
        model: nn.Module,
        calibration_batches: Iterable,
        *,
        act_quant=GranQActPerChannelStatic,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        inplace: bool = False) -> nn.Module:
    """Replace every dynamic GranQ activation quantizer by a static one of the same bit width, and collect its ranges.

    The ranges are collected from the float network (Brevitas's ``calibration_mode``: all quantization is off while it lasts) in
    evaluation mode: the average over the batches of each channel's minimum and maximum, or their union with
    ``act_quant=GranQActPerChannelStatic.let(range_mode="minmax")``, or with ``"mse"`` the average of ranges of least squared error,
    which helps at 3 bits. They are then frozen.

    Args:
        model: a model with :class:`GranQActPerChannel` quantizers, as :func:`quantize` returns it.
        calibration_batches: iterable of input tensors, or of tuples whose first element is one (labels are not used), of any
            float type and device: the synthetic images of a run of zero-shot QAT, say.
        act_quant: the static quantizer; its bit width is that of the dynamic one.
        forward: how to run the model on a batch, e.g. ``lambda model, batch: model(**batch)`` for several inputs.
        inplace: convert ``model`` itself; otherwise a deep copy.

    Returns:
        The static model, every module in the mode that it was in.

    Raises:
        ValueError: if there is no batch or no sample, nothing dynamic to replace, or calibration data is not finite.
        TypeError: if ``calibration_batches`` is one tensor, or a batch is none, or act_quant is not a static GranQ quantizer.

    Example:
        >>> from granq_plugin import quantize
        >>> dynamic = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), weight_bit_width=4, act_bit_width=4)
        >>> static = to_static(dynamic, [torch.rand(16, 3, 6, 6) for _ in range(4)])
        >>> list(static[1].act_quant.scale().shape)
        [1, 8, 1, 1]
    """
    if isinstance(calibration_batches, Tensor) or not isinstance(calibration_batches, Iterable):
        raise TypeError(f"calibration_batches must be an iterable of batches, got a {type(calibration_batches).__name__}; "
                        "give a single batch as [batch]")
    check_quantizer("act_quant", act_quant, GranQStaticActProxy)
    check_module(model)
    model = model if inplace else copy_model(model)
    dynamic = _swap_dynamic_proxies(model, act_quant)
    if not dynamic:
        raise ValueError("model has no dynamic GranQ activation quantizer (GranQActPerChannel) to make static")
    new = {m for layer, attribute, _ in dynamic for m in getattr(layer, attribute).modules()}
    collectors = {name: m for name, m in model.named_modules() if isinstance(m, CollectedRange) and m in new}
    modes = {m: m.training for m in model.modules()}
    like = next(model.parameters(), torch.empty(0))

    def first_element(model, batch):
        x = _input_of(batch)
        if len(x):
            model(x.to(like.device, like.dtype if x.is_floating_point() else x.dtype))

    batches = 0
    model.eval()
    try:
        try:
            with torch.no_grad(), calibration_mode(model):
                for batch in calibration_batches:
                    (forward or first_element)(model, batch)
                    batches += 1
        except ValueError:
            for name, collector in collectors.items():  # the same error, with the name of the first
                collector.check_finite(f"{name.split('.act_quant')[0]}: ")
            raise
        unseen = [name for name, m in collectors.items() if not m.has_ranges]
        if len(unseen) == len(collectors):
            raise ValueError(f"calibration_batches is empty: {batches} batches without a sample; at least one image is needed")
    except BaseException:  # in place, too, a failed calibration leaves the dynamic model
        for module, attribute, proxy in dynamic:
            setattr(module, attribute, proxy)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
    if unseen:
        warnings.warn(f"calibration never reached {len(unseen)} activation quantizers, first: {unseen[0]}", stacklevel=2)
    return model


def _input_of(batch) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor) or not x.dim():
        kind = "a tensor without axes" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"a calibration batch must be a tensor [B, ...] or a tuple that starts with one, got {kind}; "
                        "for other inputs give forward=")
    return x


def _swap_dynamic_proxies(model: nn.Module, act_quant) -> list[tuple[nn.Module, str, nn.Module]]:
    """Rebuild every dynamic proxy as a static one; layers that share a proxy share the new one.

    Returns:
        ``(layer, attribute, dynamic proxy)`` for each that was replaced.
    """
    swapped, places = {}, []
    for module in list(model.modules()):
        for attribute, proxy in list(module.named_children()):
            if not isinstance(proxy, GranQDynamicActProxy):
                continue
            if proxy in swapped:
                swapped[proxy].add_tracked_module(module)
            else:
                swapped[proxy] = _static_proxy(module, proxy, act_quant)
            places.append((module, attribute, proxy))
    for module, attribute, proxy in places:  # all are built: nothing can fail half-way
        setattr(module, attribute, swapped[proxy])
    return places


def _static_proxy(layer: nn.Module, proxy: GranQDynamicActProxy, act_quant):
    fused, injector = proxy.fused_activation_quant_proxy, proxy.quant_injector
    old = fused.tensor_quant
    kept = dict(
        bit_width=old.bit_width, min_val=old.clamp.min_val, max_val=old.clamp.max_val, passthrough_act=proxy.is_passthrough_act)
    options = dict(channel_axis=old.channel_axis, check_finite=old.check_finite)
    kept |= {k: v for k, v in options.items() if k not in act_quant}  # the new quantizer's own settings win
    if "act_impl" in injector:
        kept["act_impl"] = injector.act_impl
    injector = act_quant.let(**kept)
    return injector.proxy_class(layer, injector).to(next(proxy.buffers()).device).train(proxy.training)
