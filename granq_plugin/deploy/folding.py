"""Moving static per-channel activation scales into the weights: :func:`fold`, :func:`bake`."""

import itertools
from typing import NamedTuple

import brevitas.nn as qnn
import torch
from brevitas import config
from brevitas.core.quant import IntQuant
from brevitas.graph.utils import set_module
from brevitas.quant import Int8ActPerTensorFloat, Uint8ActPerTensorFloat
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from granq_plugin import functional as GF
from granq_plugin.core.int_quant import FusedIntQuant
from granq_plugin.core.proxy import GranQDynamicActProxy, GranQStaticActProxy
from granq_plugin.deploy.graph import ChannelRescale, Role, TracedModel, trace_quantized
from granq_plugin.deploy.units import Units, along, assign_units
from granq_plugin.modules import check_module, copy_model

__all__ = ["bake", "fold"]


def fold(model: nn.Module, example_input, *, trainable: bool = False, inplace: bool = False) -> fx.GraphModule:
    """Move every static per-channel activation scale out of the activations and into the weights, before these are quantized.

    1/s_c goes into the layer in front of a quantizer (batch normalization, or weight rows and bias), s_c into the input channels
    of every layer behind it. Each quantizer becomes a stock Brevitas one with scale 1 and zero point 0, so that all convolutions
    and linear layers read integers. Scales are followed through additions, concatenations, pools and reshapes; where two meet
    with no layer in between, as on identity shortcuts, a rescale per channel is put in, as a batch normalization of eps 0.

    With float weights the network computes the same function in evaluation mode (float64: to 1e-12). Quantized weights are
    quantized after the scales are in them, and so take other values than before.

    Args:
        model: static model, from :func:`granq_plugin.to_static`; stock per-tensor activation quantizers stay as they are.
        example_input: a tensor, or a tuple of them, that the model can be called on.
        trainable: keep training the unfolded weights: the scales are multiplied in at every forward
            (``torch.nn.utils.parametrize``), so that learning rates need not be found again, and what is trained is what
            :func:`bake` makes permanent. A batch normalization whose output is in units of a scale has that scale, ``[C]``, as
            its buffer ``output_scale``. The weights must be float or have quantizers that look at the weight that they are given
            (all of GranQ's).
        inplace: change the modules of ``model`` itself; otherwise a deep copy's. A failing call changes nothing in both cases.

    Returns:
        A GraphModule with the parameter names of ``model``, every module in the mode that it was in.

    Raises:
        TypeError: if model is no module.
        ValueError: names the node and the reason, where the model cannot be folded: ranges dynamic, missing or not from 0; an
            operation that cannot stand between a quantizer and the layers behind it; scales that cannot be reconciled; a layer
            that is called, or a weight that is shared, at places of different scales; learned weight scales, quantized biases.

    Example:
        >>> from granq_plugin import to_static
        >>> from granq_plugin.deploy import prepare
        >>> images = torch.rand(16, 3, 6, 6)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
        >>> static = to_static(prepare(net, images[:1]), [images])
        >>> folded = fold(static, images[:1])
        >>> list(static.get_submodule("2").act_quant.scale().shape), folded.get_submodule("2").act_quant.scale()
        ([1, 8, 1, 1], tensor(1.))
        >>> student = fold(static, images[:1], trainable=True)  # train it, then:
        >>> deployed = bake(student)
    """
    check_module(model)
    if any(isinstance(m, _Scaled) for m in model.modules()):
        raise ValueError("model is already folded (trainable=True); bake() makes that permanent")
    model = model if inplace else copy_model(model)
    traced = trace_quantized(model)
    scales, real_inputs = _quantizer_scales(traced)
    if not scales:
        raise ValueError("model has no static GranQ activation quantizer to fold; make one with quantize() and to_static()")
    traced.run(example_input)
    units = assign_units(traced, scales, real_inputs)
    changes = [_layer_change(traced, units, n) for n in traced.nodes if n in units.unit and traced.role(n) is Role.LAYER]
    changes = _merge_calls(traced, [c for c in changes if c.changes_anything])
    _check_parameters(traced.module, changes, trainable)
    activations = {n.target: _folded_activation(traced.called(n)) for n in scales}
    # everything is checked and built: from here on nothing can fail half-way
    for change in changes:
        change.apply(trainable)
    for target, activation in activations.items():
        old = traced.module.get_submodule(target)
        for alias in [n for n, m in traced.module.named_modules(remove_duplicate=False) if m is old]:
            set_module(traced.module, activation, alias)
    _insert_rescales(traced, units, next(model.parameters()))
    traced.module.graph.lint()
    traced.module.recompile()
    return traced.module


def bake(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Make the scales of ``fold(..., trainable=True)`` part of the weights, for good: the model to deploy, bit-identical in output.

    Raises:
        ValueError: if the model has no such scales: what ``fold(..., trainable=False)`` returns is deployed as it is.

    Example: see :func:`fold`.
    """
    check_module(model)
    model = model if inplace else copy_model(model)
    scaled = [(m, name) for m in model.modules() if parametrize.is_parametrized(m) for name in list(m.parametrizations)
              if any(isinstance(p, _Scaled) for p in m.parametrizations[name])]
    if not scaled:
        raise ValueError("model has no trainable scales to bake: a model that is baked, or comes from fold(..., trainable=False), "
                         "has them in its weights and is deployed as it is; any other goes through fold() first")
    for module in {m for m, _ in scaled}:  # a deep copy shares its class, which holds the properties that are removed below
        properties = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(type(module).__name__, type(module).__bases__, properties)
    for module, name in scaled:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


class _Scaled(nn.Module):
    """Parametrization: the parameter times constant factors."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class _LayerChange(NamedTuple):
    """What a layer's parameters and statistics are multiplied by, in their dtype."""
    node: fx.Node
    layer: nn.Module
    factors: dict[str, Tensor]

    @property
    def changes_anything(self) -> bool:
        return any(bool((f != 1).any()) for f in self.factors.values())

    def apply(self, trainable: bool) -> None:
        if isinstance(self.layer, _BatchNorm) and self.layer.weight is None:
            self.layer.affine = True
            self.layer.weight = nn.Parameter(torch.ones_like(self.layer.running_mean))
            self.layer.bias = nn.Parameter(torch.zeros_like(self.layer.running_mean))
        for name, factors in self.factors.items():
            tensor = getattr(self.layer, name)
            if tensor is None or bool((factors == 1).all()):
                continue
            factors = factors.to(tensor)
            if trainable and isinstance(tensor, nn.Parameter):
                parametrize.register_parametrization(self.layer, name, _Scaled(factors))
            else:
                tensor.data.mul_(factors)
        if trainable and isinstance(self.layer, _BatchNorm):  # training may compare it with the float network's
            self.layer.register_buffer("output_scale", (1 / self.factors["bias"]).to(self.layer.running_mean), persistent=False)


# --- what the quantizers are


def _quantizer_scales(traced: TracedModel) -> tuple[dict[fx.Node, Tensor], set[fx.Node]]:
    """Scales of the quantizer nodes that are to be folded, and the layers that quantize their own input in real units."""
    scales, real_inputs = {}, set()
    for node in traced.nodes:
        module, name = traced.called(node), traced.describe(node)
        proxies = dict(module.named_children()) if module is not None else {}
        for attribute in ("input_quant", "output_quant", "bias_quant", "act_quant"):
            proxy = proxies.get(attribute)
            if proxy is None or not proxy.is_quant_enabled:
                continue
            if isinstance(proxy, GranQDynamicActProxy):
                raise ValueError(f"cannot fold {name}: its {attribute} has dynamic ranges; freeze them with to_static() first")
            static = isinstance(proxy, GranQStaticActProxy)
            if attribute == "act_quant":
                if static:
                    scales[node] = _checked_scale(name, proxy)
            elif attribute == "bias_quant":
                raise ValueError(f"cannot fold {name}: its bias is quantized, by a scale that folding changes; use bias_quant=None")
            elif static:
                raise ValueError(f"cannot fold {name}: its {attribute} is per channel and part of the layer; use a QuantIdentity "
                                 f"{'in front of' if attribute == 'input_quant' else 'behind'} it, or a per-tensor quantizer")
            elif attribute == "input_quant":
                real_inputs.add(node)
            else:
                raise ValueError(f"cannot fold {name}: its output is quantized in the layer; use a QuantIdentity behind it")
    return scales, real_inputs


def _checked_scale(name: str, proxy: GranQStaticActProxy) -> Tensor:
    quantizer = proxy.fused_activation_quant_proxy.tensor_quant
    if not quantizer.scaling_impl.has_ranges:
        raise ValueError(f"cannot fold {name}: it has no ranges yet; calibrate with to_static(), or load a calibrated state dict")
    if not quantizer.scaling_impl.frozen:
        raise ValueError(f"cannot fold {name}: its ranges are still being collected; freeze them with to_static() or init_scale()")
    if not isinstance(proxy.fused_activation_quant_proxy.activation_impl, (nn.ReLU, nn.Identity)):
        activation = type(proxy.fused_activation_quant_proxy.activation_impl).__name__
        raise ValueError(f"cannot fold {name}: no scale passes through its {activation}; only ReLU and identity can be folded")
    scale, zero_point = proxy.scale(), proxy.zero_point()
    shifted = int((zero_point != 0).sum())
    if shifted:
        raise ValueError(f"cannot fold {name}: {shifted} of {zero_point.numel()} channels have a zero point that is not 0 "
                         "(ranges that do not start at 0 are asymmetric); quantize it with signed=True, or behind a ReLU")
    # a limit of ReLU6 or HardTanh vanishes where it lies beyond the last level
    low, high = _integer_range(proxy)
    clamp = quantizer.clamp
    clips = (clamp.max_val is not None and bool((clamp.max_val / scale <= high - 0.5).any())) or (
        clamp.min_val is not None and low < 0 and bool((clamp.min_val / scale >= low + 0.5).any())) or (
        clamp.min_val is not None and low == 0 and clamp.min_val > 0)
    if clips:
        raise ValueError(f"cannot fold {name}: its limits ({clamp.min_val}, {clamp.max_val}) cut off levels of the quantizer "
                         "(a learned scale, or signed without narrow_range)")
    return scale


def _integer_range(proxy) -> tuple[int, int]:
    bits = proxy.fused_activation_quant_proxy.tensor_quant.bit_width
    return GF.integer_limits(bits, bool(proxy.is_signed), bool(proxy.is_narrow_range))


def _folded_activation(layer: nn.Module) -> nn.Module:
    """A stock Brevitas layer with the same integers, scale 1 and zero point 0."""
    proxy = layer.act_quant
    fused = proxy.fused_activation_quant_proxy
    low, high = _integer_range(proxy)
    layer_class = qnn.QuantReLU if isinstance(fused.activation_impl, nn.ReLU) else qnn.QuantIdentity
    quantizer = Int8ActPerTensorFloat if proxy.is_signed else Uint8ActPerTensorFloat
    folded = layer_class(
        act_quant=quantizer.let(int_quant=IntQuant if config.JIT_ENABLED else FusedIntQuant),
        bit_width=fused.tensor_quant.bit_width, scaling_impl_type="const", scaling_init=float(max(-low, high)),
        return_quant_tensor=layer.return_quant_tensor, **(dict(narrow_range=True) if proxy.is_narrow_range else {}))
    return folded.train(layer.training).to(next(proxy.buffers()).device)


# --- what the layers absorb


def _layer_change(traced: TracedModel, units: Units, node: fx.Node) -> _LayerChange:
    layer, source = traced.called(node), node.all_input_nodes[0]
    axis = -1 if isinstance(layer, nn.Linear) else 1
    rescaled = next((r for r in units.rescales if r.reader is node), None)
    u_in = along(units.unit[source], axis) if rescaled is None else torch.ones(units.unit[source].shape[axis])
    u_out = along(units.unit[node], axis)
    if u_in is None or u_out is None:
        side = "input" if u_in is None else "output"
        raise ValueError(f"cannot fold at {traced.describe(node)}: the scales of its {side} are not one for each channel on axis "
                         f"{axis}")
    u_in, u_out = u_in.double(), u_out.double()
    if isinstance(layer, _BatchNorm):
        return _LayerChange(node, layer, _batch_norm_factors(traced, node, layer, u_in, u_out))
    groups = getattr(layer, "groups", 1)
    u_in, u_out = u_in.view(groups, -1), u_out.view(groups, -1)  # [g, I/g], [g, O/g]
    factors = u_in[:, None, :] / u_out[:, :, None]  # [g, O/g, I/g]
    if getattr(layer, "transposed", False):
        factors = factors.transpose(1, 2)  # its weight is [I, O/g, *kernel]
    factors = factors.reshape(-1, factors.shape[-1], *[1] * (layer.weight.dim() - 2))
    return _LayerChange(node, layer, dict(weight=factors, bias=1 / u_out.flatten()))


def _batch_norm_factors(traced: TracedModel, node: fx.Node, layer: _BatchNorm, u_in: Tensor, u_out: Tensor) -> dict[str, Tensor]:
    factors = dict(weight=1 / u_out, bias=1 / u_out)
    if bool((u_in == 1).all()):
        return factors
    if layer.running_var is None:
        raise ValueError(f"cannot fold at {traced.describe(node)}: it has no running statistics to take the scale of its input")
    # eps does not scale with the variance; the weight makes up for that, so that training statistics stay in one unit
    variance = layer.running_var.double()
    correction = ((variance / u_in**2 + layer.eps) / (variance + layer.eps)).sqrt() * u_in
    return dict(weight=correction / u_out, bias=1 / u_out, running_mean=1 / u_in, running_var=1 / u_in**2)


def _merge_calls(traced: TracedModel, changes: list[_LayerChange]) -> list[_LayerChange]:
    """One change for each layer. Calls that need no change count as well."""
    by_layer: dict[nn.Module, _LayerChange] = {}
    for change in changes:
        first = by_layer.setdefault(change.layer, change)
        calls = sum(traced.called(n) is change.layer for n in traced.nodes)
        agree = first.factors.keys() == change.factors.keys() and all(
            torch.equal(first.factors[k], v) for k, v in change.factors.items())
        if not agree or calls != sum(c.layer is change.layer for c in changes):
            raise ValueError(f"cannot fold {traced.describe(change.node)}: it is called at {calls} places whose scales differ; "
                             "give each place a layer of its own")
    return list(by_layer.values())


def _check_parameters(model: nn.Module, changes: list[_LayerChange], trainable: bool) -> None:
    names = {m: n for n, m in model.named_modules()}
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in names:
        for parameter in module._parameters.values():
            if parameter is not None and not names[module].endswith("_quant"):
                owners.setdefault(parameter, []).append(module)
    for change in changes:
        layer, name = change.layer, names[change.layer]
        for key in change.factors:
            tensor = getattr(layer, key, None)
            if tensor is None:
                continue
            if parametrize.is_parametrized(layer, key) or (key == "weight" and not isinstance(tensor, nn.Parameter)):
                raise ValueError(f"cannot fold '{name}': its {key} is computed from other parameters; make it a plain one")
            sharing = [names[m] for m in owners.get(tensor, []) if m is not layer and "weight_quant" not in names[m]]
            if sharing:
                raise ValueError(f"cannot fold '{name}': it shares its {key} with '{sharing[0]}'; give each a copy of its own")
        proxy = getattr(layer, "weight_quant", None)
        learned = [n for n, p in proxy.named_parameters() if p is not layer.weight] if proxy is not None else []
        if learned:
            raise ValueError(f"cannot fold '{name}': its weight quantizer has learned scales ({learned[0]}) for the unfolded "
                             "weight; use one that computes them from the weight, such as GranQWeightPerChannelSymmetric")
        if trainable and proxy is not None and proxy.is_quant_enabled and any(p is layer.weight for p in proxy.parameters()):
            raise ValueError(f"cannot fold '{name}' with trainable=True: its weight quantizer keeps looking at the unfolded "
                             "weight; use GranQWeightPerChannelSymmetric")


def _insert_rescales(traced: TracedModel, units: Units, like: Tensor) -> None:
    made: dict[tuple, fx.Node] = {}
    for producer, reader, factors in units.rescales:
        key = (producer, tuple(factors.tolist()))
        if key not in made:
            name = next(n for n in (f"rescale_{i}" for i in itertools.count(len(made)))
                        if not hasattr(traced.module, n))
            traced.module.add_submodule(name, ChannelRescale(factors.to(like)).eval())
            with traced.module.graph.inserting_after(producer):
                made[key] = traced.module.graph.call_module(name, (producer, ))
        reader.replace_input_with(producer, made[key])
