"""Quantized networks in files: weights as integers of their own bit width, everything else as it is.

A file is a safetensors file of the state dict of a network whose weights are frozen (``granq_plugin.freeze``), in which every
quantized weight ``LAYER.weight`` is replaced by ``LAYER.weight.packed``, uint8: its integers, counted from the lowest, one after
the other, k bits each, lowest bit first. The file's metadata holds k, the lowest integer and the shape of each. Zero points are
kept in the smallest integer type that holds them. Unpacked weights are bit-identical.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from granq_plugin.freeze import freeze_weights, frozen_layers, use_frozen_quantizers

__all__ = ["Packed", "pack_bits", "pack_network", "pack_tensors", "read_packed", "unpack_bits"]

CALIBRATED = "calibrated."
_FORMAT = 1
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1, of any shape, as uint8 ``[ceil(n * bits / 8)]``, lowest bit first.

    Raises:
        ValueError: for an integer out of that range.
    """
    values = integers.reshape(-1).to(torch.int64).numpy()
    if values.size and not 0 <= values.min() <= values.max() < 2**bits:
        raise ValueError(f"integers must be 0 to {2**bits - 1} for {bits} bits, got {values.min()} to {values.max()}")
    of_each = (values[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(of_each.astype(np.uint8).ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, shape) -> Tensor:
    """The int64 integers of :func:`pack_bits`. Raises a ValueError if ``packed`` has another size than they need."""
    count = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.shape != ((count * bits + 7) // 8, ):
        raise ValueError(f"{count} integers of {bits} bits are {(count * bits + 7) // 8} bytes, got {tuple(packed.shape)} of "
                         f"{packed.dtype}")
    of_each = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(of_each.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))).view(tuple(shape))


def pack_tensors(state: dict[str, Tensor]) -> bytes:
    """A float network's state dict as a safetensors file, without BatchNorm's counters, which evaluation never reads."""
    return _saved({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, {})


def pack_network(network: nn.Module, calibrated: dict[str, Tensor] | None = None) -> bytes:
    """The file of a quantized network (a folded one: baked).

    Args:
        calibrated: of a folded network: the state of the static network that was folded, whose ranges determine the structure.

    Raises:
        ValueError: see :func:`granq_plugin.freeze.freeze_weights`.
    """
    frozen = freeze_weights(network).cpu()
    state = {k: v for k, v in frozen.state_dict().items() if not k.endswith("num_batches_tracked")}
    packed = {}
    for name, layer in frozen_layers(frozen).items():
        quantizer, key = layer.weight_quant.tensor_quant, f"{name}.weight"
        integers = quantizer.to_int(state.pop(key)) - quantizer.lowest
        # the paper's formula has one level more where s * lo is exactly half-way
        bits = max(quantizer.bit_width, int(integers.max()).bit_length())
        packed[key] = dict(bits=bits, lowest=quantizer.lowest, shape=list(integers.shape))
        state[f"{key}.packed"] = pack_bits(integers, bits)
        prefix = f"{name}.weight_quant.tensor_quant."
        for buffer in ("zero_point", "offset"):
            if prefix + buffer in state:
                state[prefix + buffer] = _smallest_integers(state[prefix + buffer])
    ranges = {f"{CALIBRATED}{k}": v for k, v in (calibrated or {}).items() if "scaling_impl" in k}
    # one key of metadata: several would have no fixed order
    return _saved(state | ranges, dict(granq=json.dumps(dict(format=_FORMAT, packed=packed))))


@dataclass(frozen=True)
class Packed:
    """What a file holds.

    Attributes:
        state: the frozen network's state, but for packed weights. integers: of those, by the weight's name.
        calibrated: ranges of the network that was folded.
    """
    state: dict[str, Tensor]
    integers: dict[str, Tensor] = field(default_factory=dict)
    calibrated: dict[str, Tensor] = field(default_factory=dict)

    def install(self, network: nn.Module) -> nn.Module:
        """Put weights, scales and everything else into ``network``, of the same structure, and return it in evaluation mode.

        Raises:
            ValueError: if the file is of another network.
        """
        names = {n for n, m in network.named_modules() if hasattr(m, "weight_quant")}
        use_frozen_quantizers(network, frozenset(n for n in names if f"{n}.weight" not in self.integers))
        layers = frozen_layers(network)
        state = dict(self.state)
        for key, integers in self.integers.items():
            layer = layers.get(key.removesuffix(".weight"))
            if layer is None:
                raise ValueError(f"packed weights are of another network: it has no quantized {key}")
            quantizer = layer.weight_quant.tensor_quant
            prefix = key.removesuffix("weight") + "weight_quant.tensor_quant."
            try:
                quantizer.set(*(state[prefix + name] for name in quantizer.BUFFERS))
            except KeyError as e:
                raise ValueError(f"packed weights are of another network: they lack {e}") from e
            state[key] = quantizer.dequantize(integers)
        counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
        try:
            network.load_state_dict(counters | state)
        except RuntimeError as e:
            raise ValueError(f"packed weights are of another network: {e}") from e
        return network.eval()


def read_packed(data: bytes) -> Packed:
    """Read what :func:`pack_network` or :func:`pack_tensors` returned.

    Raises:
        ValueError: if it is damaged or something else.
    """
    from safetensors.torch import load
    try:
        state = load(data)
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        said = json.loads(header.get("granq", f'{{"format": {_FORMAT}, "packed": {{}}}}'))
        if said["format"] != _FORMAT:
            raise ValueError(f"packed weights have format {said['format']!r}, this version reads {_FORMAT}")
        integers = {key: unpack_bits(state.pop(f"{key}.packed"), e["bits"], e["shape"]) + e["lowest"]
                    for key, e in said["packed"].items()}
    except Exception as e:  # safetensors' own class, or whatever hostile metadata lead to
        raise ValueError(f"not a file of packed weights: {e!r}") from e
    calibrated = {k.removeprefix(CALIBRATED): state.pop(k) for k in list(state) if k.startswith(CALIBRATED)}
    return Packed(state, integers, calibrated)


def _smallest_integers(x: Tensor) -> Tensor:
    """``x`` in the smallest integer type that holds it exactly; as it is, if none does."""
    return next((x.to(t) for t in _INTEGERS if torch.equal(x.to(t).to(x.dtype), x)), x)


def _saved(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save
    return save({k: v.detach().cpu().contiguous().clone() for k, v in sorted(state.items()) if isinstance(v, Tensor)}, metadata)
