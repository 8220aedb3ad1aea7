"""How a zoo network is quantized, as data, and the names that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads this file without torch
    from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "ACT_RANGE_MODES", "WEIGHT_RANGE_MODES", "WEIGHT_REGIMES", "Quantization"]

WEIGHT_REGIMES = {
    "per-output-channel": "GranQWeightPerChannel",
    "per-output-channel-symmetric": "GranQWeightPerChannelSymmetric",
    "per-kernel": "GranQWeightPerKernel",
}
ACTIVATIONS = ("dynamic", "static", "folded")
WEIGHT_RANGE_MODES = ("minmax", "mse")
ACT_RANGE_MODES = ("ema", "minmax", "mse")
_SUFFIXES = {"per-output-channel": "", "per-output-channel-symmetric": "_symmetric", "per-kernel": "_per_kernel"}


@dataclass(frozen=True)
class Quantization:
    """Bit widths and regime.

    Attributes:
        weight_bit_width, act_bit_width: 1 to 16. weight_regime: of WEIGHT_REGIMES.
        activations: "dynamic" (the paper), "static", or "folded": static, with quantizers for the input, residual branches and
            pools, weights quantized after multiplication with the scales (for FINN; ``granq_plugin.deploy``).
        learned_scale: static scales go on learning once they are frozen.
        weight_range_mode: "minmax" (the paper), or "mse": ranges of least squared error; not with per-kernel weights.
        act_range_mode: how static ranges are collected: "ema", "minmax", or "mse", of least squared error.

    Raises:
        TypeError, ValueError: at construction, naming the field, the value and what is allowed.
    """
    weight_bit_width: int
    act_bit_width: int
    weight_regime: str = "per-output-channel"
    activations: str = "dynamic"
    learned_scale: bool = False
    weight_range_mode: str = "minmax"
    act_range_mode: str = "ema"

    def __post_init__(self) -> None:
        for name, allowed in (
                ("weight_regime", tuple(WEIGHT_REGIMES)), ("activations", ACTIVATIONS), ("weight_range_mode", WEIGHT_RANGE_MODES),
                ("act_range_mode", ACT_RANGE_MODES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("weight_bit_width", "act_bit_width"):
            if type(getattr(self, name)) is not int or getattr(self, name) not in range(1, 17):
                raise ValueError(f"{name} must be a whole number from 1 to 16, got {getattr(self, name)!r}")
        if type(self.learned_scale) is not bool:
            raise TypeError(f"learned_scale must be true or false, got {self.learned_scale!r}")
        if self.learned_scale and self.activations != "static":
            raise ValueError(f"learned_scale needs static activations, got {self.activations}")
        if self.act_range_mode != "ema" and self.activations == "dynamic":
            raise ValueError(f"dynamic activations collect no ranges, got act_range_mode={self.act_range_mode!r}")
        if self.weight_range_mode != "minmax" and self.weight_regime == "per-kernel":
            raise ValueError(f"per-kernel weights have minmax ranges, got weight_range_mode={self.weight_range_mode!r}")
        if self.activations == "folded" and self.weight_regime != "per-output-channel-symmetric":
            raise ValueError(f"folded activations need per-output-channel-symmetric weights, got {self.weight_regime}")

    @property
    def bits(self) -> str:
        """Such as "W4A4"."""
        return f"W{self.weight_bit_width}A{self.act_bit_width}"

    @property
    def suffix(self) -> str:
        """What stands behind the dot of an entry's name: ``granq_w4a4``, ``granq_w4a4_static``, ``granq_w3a3_per_kernel``...

        Weights are per output channel and asymmetric, activations dynamic, unless the suffix says otherwise; folded networks are
        always symmetric, and how their ranges were collected, from which training went on, is told by the card alone.
        """
        regime = "" if self.activations == "folded" else _SUFFIXES[self.weight_regime]
        weights = "" if self.weight_range_mode == "minmax" else f"_weight_{self.weight_range_mode}"
        activations = "" if self.activations == "dynamic" else f"_{self.activations}"
        learned = "_learned" if self.learned_scale else ""
        ranges = "" if self.act_range_mode == "ema" or self.activations == "folded" else f"_{self.act_range_mode}"
        return f"granq_{self.bits.lower()}{regime}{weights}{activations}{learned}{ranges}"

    @property
    def weight_quant(self):
        """The weight quantizer's injector."""
        import granq_plugin as gq
        quant = getattr(gq, WEIGHT_REGIMES[self.weight_regime])
        return quant if self.weight_range_mode == "minmax" else quant.let(range_mode=self.weight_range_mode)

    @property
    def act_quant(self):
        """The activation quantizer's injector; of folded activations that of the static network that is folded."""
        import granq_plugin as gq
        if self.activations == "dynamic":
            return gq.GranQActPerChannel
        return gq.GranQActPerChannelStatic.let(learned_scale=self.learned_scale, range_mode=self.act_range_mode)

    def build(
            self, teacher: nn.Module, example_input: Tensor,
            calibrate: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
        """A float network with these quantizers and its own weights. A folded one is trainable: ``deploy.bake`` ends that.

        Args:
            calibrate: for folded activations: gives the prepared network its ranges, and returns it.

        Raises:
            ValueError: for folded activations without ``calibrate``; and see :func:`granq_plugin.quantize`.
        """
        import granq_plugin as gq
        if self.activations != "folded":
            return gq.quantize(
                teacher, self.weight_bit_width, self.act_bit_width, weight_quant=self.weight_quant, act_quant=self.act_quant)
        if calibrate is None:
            raise ValueError("folded activations need ranges first: images of another run, or calibration data")
        from granq_plugin.deploy import fold
        return fold(calibrate(self.prepared(teacher, example_input)), example_input, trainable=True)

    def deployable(
            self, teacher: nn.Module, example_input: Tensor,
            calibrate: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
        """As :meth:`build`, with the structure of what is deployed (a folded network baked), for a state dict that brings its
        weights."""
        network = self.build(teacher, example_input, calibrate)
        if self.activations == "folded":
            from granq_plugin.deploy import bake
            network = bake(network)
        return network

    def deployed(self, trained: nn.Module, example_input: Tensor) -> nn.Module:
        """What is deployed of a trained student, whose accuracy is measured and which is saved: of a folded one a baked copy,
        cleared of rounding ties; any other is deployed as it is."""
        if self.activations != "folded":
            return trained
        from granq_plugin.deploy import bake, clear_ties
        return clear_ties(bake(trained), example_input.to(next(trained.parameters()).device), inplace=True)[0].eval()

    def prepared(self, teacher: nn.Module, example_input: Tensor) -> nn.Module:
        """With folded activations: the static network that is calibrated, then folded."""
        from granq_plugin.deploy import prepare
        return prepare(
            _deployable(teacher), example_input, self.weight_bit_width, self.act_bit_width,
            weight_quant=self.weight_quant, act_quant=self.act_quant)


def _deployable(teacher: nn.Module) -> nn.Module:
    """Padding shortcuts as convolutions, which accelerators map."""
    from zoo.models.cifar_resnet import PaddingShortcut, convolution_shortcuts
    return convolution_shortcuts(teacher) if any(isinstance(m, PaddingShortcut) for m in teacher.modules()) else teacher
