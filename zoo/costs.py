"""What a network costs for one image: parameters, multiply-accumulates, bit operations, bytes of weights."""

import tempfile
from pathlib import Path

import torch
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor, nn

from granq_plugin.export.describe import FLOAT_BITS, describe
from zoo.card import Costs

__all__ = ["costs"]


def costs(network: nn.Module, example_input: Tensor) -> Costs:
    """Count a network's costs, as ``granq report`` counts them in its exported file; a float one's at 32 bits.

    Args:
        example_input: one image, ``[1, C, S, S]``.

    Raises:
        ModuleNotFoundError: for a quantized network without the extra ``export``.
    """
    parameters = sum(p.numel() for p in network.parameters())
    if any(isinstance(m, QuantProxyFromInjector) for m in network.modules()):
        from granq_plugin.export import export_qonnx, report
        with tempfile.TemporaryDirectory() as folder:
            totals = report(export_qonnx(network, example_input, Path(folder, "network.onnx"))).totals()
        return Costs(parameters, int(totals["macs"]), int(totals["bit_operations"]), round(totals["weight_bytes"]))
    layers = dict(network.named_modules())
    weights = sum({layers[name].weight: layers[name].weight.numel()
                   for name, _ in describe(network, (example_input, ))["weight_bit_widths"]}.values())
    macs = _macs(network, example_input)
    return Costs(parameters, macs, macs * FLOAT_BITS**2, weights * FLOAT_BITS // 8)


@torch.no_grad()
def _macs(network: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers."""
    counts = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        read = inputs[0] if isinstance(layer, transposed) else output  # its values meet as many weights each
        counts.append(read.numel() // len(example_input) * layer.weight[0].numel())
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed)
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    try:
        network(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)
