"""What an exported file says of its network."""

from typing import Any

import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase, DynamicActQuantProxyFromInjector
from torch import Tensor, nn

from granq_plugin._version import __version__

__all__ = ["FLOAT_BITS", "describe"]

FLOAT_BITS = 32
_WEIGHT_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def describe(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Run the model once and note its plugin version, bit widths in the order of execution, and where ranges come from.

    Returns:
        ``plugin_version``; ``weight_bit_widths`` and ``activation_bit_widths``, lists of ``[name, bits]`` with an entry per call of
        a layer (32: float weights) or quantizer; ``activation_ranges``: "dynamic", "static", "dynamic and static" or "none".
    """
    layers, quantizers, hooks = [], [], []

    def note_layer(name):
        return lambda layer, *_: layers.append((name, layer))

    def note_quantizer(name):
        return lambda proxy, inputs, _: quantizers.append((name, proxy)) if inputs[0].dim() else None  # 0-d: Brevitas's sentinel

    for name, m in model.named_modules():
        if isinstance(m, _WEIGHT_LAYERS):
            hooks.append(m.register_forward_hook(note_layer(name)))
        elif isinstance(m, ActQuantProxyFromInjectorBase) and m.is_quant_enabled:
            hooks.append(m.register_forward_hook(note_quantizer(name)))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {"dynamic" if isinstance(p, DynamicActQuantProxyFromInjector) else "static" for _, p in quantizers}
    return dict(
        plugin_version=__version__,
        weight_bit_widths=[[name, _weight_bits(layer)] for name, layer in layers],
        activation_bit_widths=[[name.removesuffix(".act_quant"), int(proxy.bit_width())] for name, proxy in quantizers],
        activation_ranges=" and ".join(sorted(ranges)) or "none")


def _weight_bits(layer: nn.Module) -> int:
    proxy = getattr(layer, "weight_quant", None)
    return FLOAT_BITS if proxy is None or not proxy.is_quant_enabled else int(proxy.bit_width())
