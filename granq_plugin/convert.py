"""From float to quantized: :func:`quantize`."""

import collections
import copy
import fnmatch
import warnings
from collections.abc import Mapping
from typing import Any

import brevitas.nn as qnn
from brevitas.graph.base import ModuleToModuleByInstance
from brevitas.graph.utils import set_module
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjectorBase
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import fx, nn

from granq_plugin.functional import check_bit_width
from granq_plugin.modules import check_module, copy_model
from granq_plugin.quantizers import GranQActPerChannel, GranQWeightPerChannel, check_quantizer
from granq_plugin.relus import RELUS, separate_relus, trace

__all__ = ["quantize"]

_FLOAT_ACTIVATIONS = (nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.SELU, nn.SiLU,
                      nn.Softplus)
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
_QUANTIZER_PROXIES = dict(
    weight_quant=WeightQuantProxyFromInjectorBase, act_quant=ActQuantProxyFromInjectorBase,
    input_quant=ActQuantProxyFromInjectorBase)
_OVERRIDE_KEYS = ("weight_bit_width", "weight_quant", "act_bit_width", "act_quant")


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
    the image input, pre-add branches and pooled features stay float. Functional ReLUs, and ReLU modules that are called at
    several places, are found by tracing with torch.fx, and each call gets its own quantizer. The result is then a GraphModule
    with the same parameter names (of a layer registered twice, the first): it has the forward alone of the class's methods,
    takes the required arguments, keeps the branches of the present mode (a UserWarning says if there are others) and drops
    modules that the forward does not reach. Any other model keeps its class. Where tracing fails a UserWarning says what could
    not be seen.

    Args:
        model: float torch model, on any device; in evaluation mode unless it is to be trained.
        weight_bit_width, act_bit_width: 1 to 16; None leaves all weights / activations in float.
        weight_quant, act_quant: quantizers (Brevitas injectors, stock ones too).
        input_bit_width: also quantize the model's input, at the weight layers that read it; None: leave it in float (paper).
        input_quant: quantizer for it, default ``act_quant``.
        first_layer_bit_width, last_layer_bit_width: weight bit widths of the first and the last weight layer, in the order of
            execution (of registration, if the model cannot be traced).
        overrides: shell patterns of layer names -> settings that differ there (``weight_bit_width``, ``act_bit_width``,
            ``weight_quant``, ``act_quant``), or None to leave the matching layers in float. Later patterns win, and all win
            over the first and last layer's.
        inplace: reuse the model's modules and put the quantized ones into it; otherwise work on a deep copy. Use the model
            that is returned in both cases.

    Returns:
        The quantized model, every module in the mode that it was in, on the device of its parameters.

    Raises:
        TypeError, ValueError: before anything is converted, for a bad bit width, an unknown setting, a pattern that matches no
            layer, a model that is already quantized or has no layer to quantize.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> low_bit = quantize(net, weight_bit_width=3, act_bit_width=3, overrides={"3": {"weight_bit_width": 8}})
    """
    check_module(model)
    if type(model) in WEIGHT_LAYERS or isinstance(model, RELUS):
        raise ValueError(f"model is a single {type(model).__name__}, which cannot be replaced in itself: wrap it in nn.Sequential")
    for bit_width in (weight_bit_width, act_bit_width, input_bit_width, first_layer_bit_width, last_layer_bit_width):
        _check_optional_bit_width(bit_width)
    _check_quantizers(dict(weight_quant=weight_quant, act_quant=act_quant))
    if input_quant is not None:
        _check_quantizers(dict(input_quant=input_quant))
        if input_bit_width is None:
            raise ValueError("input_quant needs input_bit_width")
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dict of name patterns to settings, got {overrides!r}")
    for pattern, settings in overrides.items():
        _check_override(pattern, settings)
    if any(isinstance(m, QuantProxyFromInjector) for m in model.modules()):
        raise ValueError("model is already quantized: it contains Brevitas quantizers; start from the float model")

    model, graph = _prepare(model if inplace else copy_model(model), act_bit_width is not None)
    weight_layers, relus = _quantizable_names(model, graph)
    if not weight_layers:
        raise ValueError(f"model has no convolution or linear layer to quantize; known: "
                         f"{', '.join(c.__name__ for c in WEIGHT_LAYERS)}, outside of {', '.join(c.__name__ for c in OPAQUE)}")
    if not relus and act_bit_width is not None:
        warnings.warn("model has no ReLU or ReLU6: no activation is quantized", stacklevel=2)
    if act_bit_width is not None:
        _warn_of_float_activations(model)
    settings = {n: dict(weight_bit_width=weight_bit_width, weight_quant=weight_quant) for n in weight_layers}
    settings |= {n: dict(act_bit_width=act_bit_width, act_quant=act_quant) for n in relus}
    for name, bit_width in ((weight_layers[0], first_layer_bit_width), (weight_layers[-1], last_layer_bit_width)):
        if bit_width is not None:
            settings[name]["weight_bit_width"] = bit_width
    for pattern, override in overrides.items():
        _apply_override(settings, pattern, override)

    device = next(model.parameters()).device
    inputs = _input_layers(weight_layers, graph) if input_bit_width else []
    # an injector that brings no attributes of its own is falsy
    input_settings = dict(input_quant=act_quant if input_quant is None else input_quant, input_bit_width=input_bit_width)
    replaced = {n: _quant_weight_layer(model.get_submodule(n), settings[n], input_settings if n in inputs else {})
                for n in weight_layers}
    replaced |= {n: _quant_relu(model.get_submodule(n), settings[n]) for n in relus}
    _warn_of_float_weights(model, settings)
    for name, new in replaced.items():  # everything is built: from here on nothing can fail half-way
        _replace(model, model.get_submodule(name), new.to(device))
    return model


def _check_optional_bit_width(bit_width) -> None:
    if bit_width is not None:
        check_bit_width(bit_width)


def _check_quantizers(settings: Mapping) -> None:
    for argument, proxy_class in _QUANTIZER_PROXIES.items():
        if argument in settings:
            check_quantizer(argument, settings[argument], proxy_class)


def _check_override(pattern: str, settings) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"override patterns are layer names, got {pattern!r}")
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise TypeError(f"override {pattern!r} must map to a dict or None, got {settings!r}")
    unknown = [k for k in settings if k not in _OVERRIDE_KEYS]
    if unknown:
        raise ValueError(f"override {pattern!r} has unknown setting {unknown[0]!r}; allowed: {', '.join(_OVERRIDE_KEYS)}")
    for key in ("weight_bit_width", "act_bit_width"):
        _check_optional_bit_width(settings.get(key))
    _check_quantizers(settings)


def _apply_override(settings: dict[str, dict], pattern: str, override: Mapping | None) -> None:
    matches = fnmatch.filter(settings, pattern)
    if not matches:
        raise ValueError(f"override {pattern!r} matches no layer; layers are: {', '.join(settings)}")
    if override is None:
        override = dict(weight_bit_width=None, act_bit_width=None)
    else:
        for key in override:
            if not any(key in settings[n] for n in matches):
                raise ValueError(f"override {pattern!r} sets {key!r}, which none of its layers has: {', '.join(matches)}")
    for name in matches:
        settings[name].update({k: v for k, v in override.items() if k in settings[name]})


def _prepare(model: nn.Module, needs_relus: bool) -> tuple[nn.Module, fx.Graph | None]:
    """The model with a module for every ReLU call, and its graph if it can be traced."""
    try:
        graph_model = trace(model)
    except Exception as e:  # tracing runs the user's forward: anything may come out of it
        if needs_relus and not any(isinstance(m, RELUS) for m in model.modules()):
            raise ValueError(
                f"model has no ReLU module and cannot be traced to look for functional ones ({type(e).__name__}: {e}); "
                "use nn.ReLU modules") from e
        warnings.warn(
            f"the model cannot be traced ({type(e).__name__}: {e}): only its ReLU modules are quantized, functional ReLUs stay "
            "float, and a ReLU module that is called at several places keeps one quantizer", stacklevel=3)
        return model, None
    return separate_relus(model, graph_model), graph_model.graph


def _quantizable_names(model: nn.Module, graph: fx.Graph | None) -> tuple[list[str], list[str]]:
    """Names of the weight layers, in order of execution where there is a graph, and of the ReLUs."""
    modules = dict(model.named_modules())
    opaque = tuple(f"{n}." for n, m in modules.items() if isinstance(m, OPAQUE))
    executed = [n.target for n in graph.nodes if n.op == "call_module"] if graph else []
    names = [n for n in dict.fromkeys([*executed, *modules]) if n in modules and not f"{n}.".startswith(opaque)]

    def has_parameter(layer):  # weight_norm and its like compute the weight
        return isinstance(layer._parameters.get("weight"), nn.Parameter)
    return ([n for n in names if type(modules[n]) in WEIGHT_LAYERS and has_parameter(modules[n])],
            [n for n in names if type(modules[n]) in RELUS])


def _input_layers(weight_layers: list[str], graph: fx.Graph | None) -> list[str]:
    """The weight layers that read an input of the model; the first one if none does directly."""
    readers = [n.target for n in graph.nodes if n.op == "call_module" and n.target in weight_layers and
               any(i.op == "placeholder" for i in n.all_input_nodes)] if graph else []
    return readers or weight_layers[:1]


def _quant_weight_layer(layer: nn.Module, settings: dict, input_settings: dict) -> nn.Module:
    bit_width = settings["weight_bit_width"]
    if bit_width is None and not input_settings:
        return layer
    kwargs = dict(weight_quant=None) if bit_width is None else dict(
        weight_quant=settings["weight_quant"], weight_bit_width=check_bit_width(bit_width))
    rewriter = ModuleToModuleByInstance(layer, WEIGHT_LAYERS[type(layer)], bias_quant=None, **kwargs, **input_settings)
    new = rewriter.init_new_module(copy.copy(layer), load_state_dict=False)  # copy: Brevitas leaves a mark on the old layer
    new.weight, new.bias = layer.weight, layer.bias  # the same parameters: tied weights stay tied, frozen ones frozen
    new.weight_quant.init_tensor_quant()
    return _as_successor_of(layer, new)


def _quant_relu(relu: nn.Module, settings: dict) -> nn.Module:
    if settings["act_bit_width"] is None:
        return relu
    limit = dict(max_val=6.0) if isinstance(relu, nn.ReLU6) else {}
    return _as_successor_of(relu, qnn.QuantReLU(
        act_quant=settings["act_quant"], bit_width=check_bit_width(settings["act_bit_width"]), **limit))


def _as_successor_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with the mode and the hooks of ``old``."""
    new.train(old.training)
    for attribute in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
                      "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"):
        setattr(new, attribute, getattr(old, attribute))
    return new


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is referenced."""
    if new is not old:
        for alias in [n for n, m in model.named_modules(remove_duplicate=False) if m is old]:
            set_module(model, new, alias)


def _warn_of_float_activations(model: nn.Module) -> None:
    """Say which activation modules have no quantizer of their own, so that the next layer reads floats."""
    left = (type(m) for m in model.modules() if isinstance(m, _FLOAT_ACTIVATIONS) and not isinstance(m, RELUS))
    kinds = collections.Counter(kind.__name__ for kind in left)
    if kinds:
        warnings.warn(f"these activations stay float, and so does what the next layer reads: "
                      f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}; "
                      "put a brevitas.nn.QuantIdentity behind them", stacklevel=3)


def _warn_of_float_weights(model: nn.Module, converted: Mapping) -> None:
    """Say which layers stay in float, other than those that were asked to."""
    left = [name for name, m in model.named_modules() if name not in converted and isinstance(m, tuple(WEIGHT_LAYERS))]
    if left:
        warnings.warn(f"{len(left)} weight layers inside attention, of unknown type or never called stay float: "
                      f"{', '.join(left[:5])}", stacklevel=3)
