"""From float to quantized (:func:`quantize`), and from dynamic to static ranges (:func:`to_static`)."""

import copy
import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import brevitas.nn as qnn
import torch
import torch.nn.functional as F
from brevitas.graph.base import MethodToModule, ModuleToModuleByInstance
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.standardize import DuplicateSharedStatelessModule, TorchFunctionalToModule
from brevitas.graph.utils import set_module
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace  # brevitas.fx is deprecated; Brevitas's graph transforms take these too

from granq_plugin.core.proxy import GranQDynamicActProxy
from granq_plugin.core.ranges import CollectedRange
from granq_plugin.functional import check_bit_width
from granq_plugin.quantizers import GranQActPerChannel, GranQActPerChannelStatic, GranQWeightPerChannel

__all__ = ["quantize", "to_static"]

WEIGHT_LAYERS = {
    nn.Linear: qnn.QuantLinear,
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Conv3d: qnn.QuantConv3d,
    nn.ConvTranspose1d: qnn.QuantConvTranspose1d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
    nn.ConvTranspose3d: qnn.QuantConvTranspose3d,
}
# These call their children's weights directly (attention, the transformer's fast path), past any quantizer.
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
RELUS = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = ((F.relu, nn.ReLU), (F.relu_, nn.ReLU), (torch.relu, nn.ReLU), (torch.relu_, nn.ReLU), (F.relu6, nn.ReLU6))
_RELU_METHODS = ("relu", "relu_")
_OVERRIDE_KEYS = ("weight_bit_width", "act_bit_width", "weight_quant", "act_quant")


def quantize(
        model: nn.Module,
        weight_bit_width: int | None = 4,
        act_bit_width: int | None = 4,
        *,
        weight_quant=GranQWeightPerChannel,
        act_quant=GranQActPerChannel,
        input_bit_width: int | None = None,
        input_quant=None,
        first_layer_bit_width: int | None = None,
        last_layer_bit_width: int | None = None,
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        inplace: bool = False) -> nn.Module:
    """Turn a float model into a Brevitas model with the paper's placement.

    Every convolution and linear layer gets quantized weights (biases stay float), every ReLU and ReLU6 a quantized output;
    the image input, pre-add branches and pooled features stay float. Shared ReLU instances and functional ReLUs are found by
    tracing with torch.fx, and each call gets its own quantizer; the result is then a GraphModule of the same parameter
    names. A model without them keeps its class. Where tracing fails a UserWarning says what could not be seen.

    Args:
        model: float torch model, in any mode, on any device.
        weight_bit_width, act_bit_width: 1 to 16; None leaves all weights / activations in float.
        weight_quant, act_quant: quantizers (Brevitas injectors, stock ones too).
        input_bit_width: also quantize the model's input, at the first weight layer; None: leave it in float (paper).
        input_quant: quantizer for it, default ``act_quant``.
        first_layer_bit_width, last_layer_bit_width: weight bit widths of the first and the last weight layer.
        overrides: shell patterns of layer names -> settings that differ there (``weight_bit_width``, ``act_bit_width``,
            ``weight_quant``, ``act_quant``), or None to leave the matching layers in float. Later patterns win, and all win
            over the first and last layer's.
        inplace: convert ``model`` itself (its modules are reused); otherwise a deep copy.

    Returns:
        The quantized model, in the same mode, on the same device.

    Raises:
        TypeError, ValueError: before anything is converted, for a bad bit width, an unknown setting, a pattern that matches no
            layer, a model that is already quantized or has no layer to quantize.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> low_bit = quantize(net, weight_bit_width=3, act_bit_width=3, overrides={"3": {"weight_bit_width": 8}})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if type(model) in WEIGHT_LAYERS or isinstance(model, RELUS):
        raise ValueError(f"model is a single {type(model).__name__}, which cannot be replaced in itself: wrap it in nn.Sequential")
    for bit_width in (weight_bit_width, act_bit_width, input_bit_width, first_layer_bit_width, last_layer_bit_width):
        _check_optional_bit_width(bit_width)
    overrides = overrides or {}
    for pattern, settings in overrides.items():
        _check_override(pattern, settings)
    if any(isinstance(m, QuantProxyFromInjector) for m in model.modules()):
        raise ValueError("model is already quantized: it contains Brevitas quantizers; start from the float model")

    model = _make_relus_separate(model if inplace else copy.deepcopy(model))
    weight_layers, relus = _quantizable_names(model)
    if not weight_layers:
        raise ValueError("model has no convolution or linear layer to quantize; known: " +
                         ", ".join(c.__name__ for c in WEIGHT_LAYERS))
    if not relus and act_bit_width is not None:
        warnings.warn("model has no ReLU or ReLU6: no activation is quantized", stacklevel=2)
    settings = {
        name: dict(
            weight_bit_width=weight_bit_width, act_bit_width=act_bit_width, weight_quant=weight_quant, act_quant=act_quant)
        for name in weight_layers + relus}
    for name, bit_width in ((weight_layers[0], first_layer_bit_width), (weight_layers[-1], last_layer_bit_width)):
        if bit_width is not None:
            settings[name]["weight_bit_width"] = bit_width
    for pattern, override in overrides.items():
        matches = fnmatch.filter(settings, pattern)
        if not matches:
            raise ValueError(f"override {pattern!r} matches no layer; layers are: {', '.join(settings)}")
        for name in matches:
            settings[name].update(
                dict(weight_bit_width=None, act_bit_width=None) if override is None else override)

    first_input = dict(input_quant=input_quant or act_quant, input_bit_width=input_bit_width) if input_bit_width else {}
    _replace(model, weight_layers, lambda name, m: _quant_weight_layer(
        m, settings[name], first_input if name == weight_layers[0] else {}))
    _replace(model, relus, lambda name, m: _quant_relu(m, settings[name]))
    _warn_of_float_weights(model, settings)
    return model


def to_static(
        model: nn.Module,
        calibration_batches: Iterable,
        *,
        act_quant=GranQActPerChannelStatic,
        inplace: bool = False) -> nn.Module:
    """Replace every dynamic GranQ activation quantizer by a static one of the same bit width, and collect its ranges.

    The ranges are collected from the float network (Brevitas's ``calibration_mode``: all quantization is off while it lasts) in
    evaluation mode: the average over the batches of each channel's minimum and maximum, or their union with
    ``act_quant=GranQActPerChannelStatic.let(range_mode="minmax")``. They are then frozen.

    Args:
        model: a model with :class:`GranQActPerChannel` quantizers, as :func:`quantize` returns it.
        calibration_batches: iterable of input tensors, or of tuples whose first element is one (labels are not used).
        act_quant: the static quantizer.
        inplace: convert ``model`` itself; otherwise a deep copy.

    Returns:
        The static model, in the mode that ``model`` was in.

    Raises:
        ValueError: if there is no batch, nothing dynamic to replace, or calibration data is not finite.
        TypeError: if a batch is not a tensor.
    """
    batches = iter(calibration_batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration_batches is empty: at least one batch of inputs is needed")
    model = model if inplace else copy.deepcopy(model)
    if not _swap_dynamic_proxies(model, act_quant):
        raise ValueError("model has no dynamic GranQ activation quantizer (GranQActPerChannel) to make static")
    training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    with torch.no_grad(), calibration_mode(model):
        for batch in _chain(first, batches):
            model(_input_of(batch).to(device))
    model.train(training)
    unseen = [name for name, m in model.named_modules() if isinstance(m, CollectedRange) and not m.has_ranges]
    if unseen:
        warnings.warn(f"calibration never reached {len(unseen)} activation quantizers, first: {unseen[0]}", stacklevel=2)
    return model


def _chain(first, rest):
    yield first
    yield from rest


def _input_of(batch) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"a calibration batch must be a tensor or a tuple that starts with one, got {type(x).__name__}")
    return x


def _check_optional_bit_width(bit_width) -> None:
    if bit_width is not None:
        check_bit_width(bit_width)


def _check_override(pattern: str, settings) -> None:
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise TypeError(f"override {pattern!r} must map to a dict or None, got {settings!r}")
    unknown = sorted(set(settings) - set(_OVERRIDE_KEYS))
    if unknown:
        raise ValueError(f"override {pattern!r} has unknown setting {unknown[0]!r}; allowed: {', '.join(_OVERRIDE_KEYS)}")
    for key in ("weight_bit_width", "act_bit_width"):
        _check_optional_bit_width(settings.get(key))


def _make_relus_separate(model: nn.Module) -> nn.Module:
    """Trace the model if it calls a ReLU as a function or one ReLU module at several places; otherwise return it as it is."""
    try:
        graph_model = symbolic_trace(model)
    except Exception as e:  # tracing runs the user's forward: anything may come out of it
        if not any(isinstance(m, RELUS) for m in model.modules()):
            raise ValueError(
                f"model has no ReLU module and cannot be traced to look for functional ones ({type(e).__name__}: {e}); "
                "use nn.ReLU modules") from e
        warnings.warn(
            f"the model cannot be traced ({type(e).__name__}: {e}): only its ReLU modules are quantized, functional ReLUs stay "
            "float, and a ReLU module that is called at several places keeps one quantizer", stacklevel=3)
        return model
    calls = [n.target for n in graph_model.graph.nodes if n.op == "call_module"]
    modules = dict(graph_model.named_modules())
    shared = any(calls.count(t) > 1 and isinstance(modules[t], RELUS) for t in set(calls))
    functional = any(
        (n.op == "call_function" and n.target in dict(_RELU_FUNCTIONS)) or
        (n.op == "call_method" and n.target in _RELU_METHODS) for n in graph_model.graph.nodes)
    if not (shared or functional):
        return model
    graph_model = TorchFunctionalToModule(_RELU_FUNCTIONS).apply(graph_model)
    for method in _RELU_METHODS:
        graph_model = MethodToModule(method, nn.ReLU).apply(graph_model)
    graph_model = DuplicateSharedStatelessModule().apply(graph_model)
    graph_model.train(model.training)
    return graph_model


def _quantizable_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the weight layers, in order of execution where the model is a graph, and of the ReLUs."""
    modules = dict(model.named_modules())
    opaque = tuple(f"{n}." for n, m in modules.items() if isinstance(m, OPAQUE))
    names = [n for n in modules if not f"{n}.".startswith(opaque)]
    if isinstance(model, GraphModule):
        names = list(dict.fromkeys(n.target for n in model.graph.nodes if n.op == "call_module"))
    return ([n for n in names if type(modules[n]) in WEIGHT_LAYERS], [n for n in names if type(modules[n]) in RELUS])


def _quant_weight_layer(layer: nn.Module, settings: dict, input_settings: dict) -> nn.Module:
    bit_width = settings["weight_bit_width"]
    if bit_width is None and not input_settings:
        return layer
    kwargs = dict(weight_quant=None) if bit_width is None else dict(
        weight_quant=settings["weight_quant"], weight_bit_width=check_bit_width(bit_width))
    rewriter = ModuleToModuleByInstance(layer, WEIGHT_LAYERS[type(layer)], bias_quant=None, **kwargs, **input_settings)
    device, weight, bias = layer.weight.device, layer.weight, layer.bias
    new = rewriter.init_new_module(layer).to(device)
    new.weight, new.bias = weight, bias  # the same parameters: tied weights stay tied, frozen ones frozen
    new.weight_quant.init_tensor_quant()
    return new


def _quant_relu(relu: nn.Module, settings: dict) -> nn.Module:
    if settings["act_bit_width"] is None:
        return relu
    limit = dict(max_val=6.0) if isinstance(relu, nn.ReLU6) else {}
    return qnn.QuantReLU(
        act_quant=settings["act_quant"], bit_width=check_bit_width(settings["act_bit_width"]), **limit)


def _replace(model: nn.Module, names: list[str], build) -> None:
    """Put ``build(name, module)`` in the place of each named module, wherever else the same instance is referenced too."""
    for name in names:
        old = model.get_submodule(name)
        new = build(name, old)
        if new is old:
            continue
        new.train(old.training)
        aliases = [n for n, m in model.named_modules(remove_duplicate=False) if m is old]
        for alias in aliases:
            set_module(model, new, alias)


def _warn_of_float_weights(model: nn.Module, converted: Mapping) -> None:
    """Say which layers stay in float, other than those that were asked to."""
    left = [
        name for name, m in model.named_modules()
        if name not in converted and isinstance(m, tuple(WEIGHT_LAYERS)) and not hasattr(m, "weight_quant")]
    if left:
        warnings.warn(f"{len(left)} weight layers inside attention, of unknown type or never called stay float: "
                      f"{', '.join(left[:5])}", stacklevel=3)


def _swap_dynamic_proxies(model: nn.Module, act_quant) -> int:
    """Rebuild every dynamic proxy as a static one; layers that share a proxy share the new one."""
    swapped = {}
    for module in list(model.modules()):
        for attribute, proxy in list(module.named_children()):
            if not isinstance(proxy, GranQDynamicActProxy):
                continue
            if proxy in swapped:
                swapped[proxy].add_tracked_module(module)
            else:
                swapped[proxy] = _static_proxy(module, proxy, act_quant)
            setattr(module, attribute, swapped[proxy])
    return len(swapped)


def _static_proxy(layer: nn.Module, proxy: GranQDynamicActProxy, act_quant):
    fused, injector = proxy.fused_activation_quant_proxy, proxy.quant_injector
    old = fused.tensor_quant
    kept = dict(
        bit_width=old.bit_width, channel_axis=old.channel_axis, check_finite=old.check_finite,
        min_val=old.clamp.min_val, max_val=old.clamp.max_val, passthrough_act=proxy.is_passthrough_act)
    if "act_impl" in injector:
        kept["act_impl"] = injector.act_impl
    injector = act_quant.let(**kept)
    return injector.proxy_class(layer, injector).to(next((b.device for b in proxy.buffers()), "cpu")).train(proxy.training)
