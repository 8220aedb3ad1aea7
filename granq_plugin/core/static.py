"""Static per-channel activations: ranges collected, then frozen. Integer arithmetic is Brevitas's own ``IntQuant``."""

from typing import NamedTuple

import torch
from brevitas import config
from brevitas.function.ops_ste import abs_binary_sign_grad, scalar_clamp_min_ste
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin import kernels
from granq_plugin.core.base import ActClamp, GranQBase
from granq_plugin.core.int_quant import has_stock_arithmetic
from granq_plugin.core.ranges import CollectedRange

__all__ = ["StaticGranQ"]


class _Grid(NamedTuple):
    """Scale and zero point of frozen ranges, and what they were computed from."""
    scale: Tensor
    zero_point: Tensor
    lo: Tensor
    hi: Tensor
    shape: tuple[int, int]
    versions: tuple[int, ...]

    def holds_for(self, lo: Tensor, hi: Tensor, shape: tuple[int, int]) -> bool:
        """Whether the ranges are these, and nobody has written to any of the tensors since."""
        return (self.lo is lo and self.hi is hi and self.shape == shape
                and self.versions == _versions(self.scale, self.zero_point, lo, hi))


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(t._version for t in tensors)


class StaticGranQ(GranQBase):
    """Per-channel ranges collected over batches, then frozen.

    While in training mode, the first ``collect_stats_steps`` batches update the ranges and are quantized with what has been
    collected so far; then the ranges freeze. Brevitas's ``calibration_mode`` collects for as long as it lasts, averages instead
    of the EMA, and freezes at its end. No shape is needed.

    Args:
        int_quant, int_scaling_impl, bit_width: see :class:`~granq_plugin.core.base.GranQBase`.
        scaling_impl: the :class:`~granq_plugin.core.ranges.CollectedRange`, made from these options:
            range_mode: "ema" (moving average of the batches' ranges), "minmax" (their union), or "mse" (moving average of the
            shares of the batches' ranges, from 0.2 to 1, that have the least squared error at this bit width: at few bits the
            outermost values cost the others more than they are worth);
            momentum: weight of the newest batch in the EMA, in (0, 1]; None: plain average of all batches;
            collect_stats_steps: batches to collect in training mode before freezing, at least 1;
            sync_ranges: under torch.distributed, collect over the batches of all ranks, so that ranges stay equal; all ranks
            must then run the same number of collecting forwards;
            channel_axis: where C stands in the input; not 0.
        signed: False: asymmetric unsigned, zero point 0 after a ReLU. True: symmetric, zero point 0; int_quant may then have a
            narrow range, of which -(2^(k-1) - 1) is the lowest integer.
        learned_scale: after freezing, the scale is a parameter, trained through the rounding (as in LSQ). It has no elements
            before; wrap the model in DistributedDataParallel after calibration.
        min_val, max_val, check_finite: as for :class:`~granq_plugin.core.dynamic.DynamicGranQ`.

    Returns:
        ``(value, scale, zero_point, bit_width)``, scale of shape ``[1, C, 1, ...]``.
    """

    fuses = True

    def __init__(
            self,
            int_quant: nn.Module,
            int_scaling_impl: nn.Module,
            scaling_impl: CollectedRange,
            bit_width: int,
            signed: bool = False,
            learned_scale: bool = False,
            min_val: float | None = None,
            max_val: float | None = None,
            check_finite: bool = False) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width)
        GF.check_symmetric(signed, self.bit_width)
        self.scaling_impl = scaling_impl
        self.signed = signed
        self.clamp = ActClamp(min_val, max_val)
        self.check_finite = check_finite
        self.learned_scale = nn.Parameter(torch.empty(0)) if learned_scale else None
        self._grid: _Grid | None = None

    def init_scale(self) -> None:
        """Freeze the ranges and start learning from their scale; see :meth:`CollectedRange.init_scale`."""
        self.scaling_impl.init_scale()
        if self.learned_scale is not None and self.learned_scale.numel() == 0 and self.scaling_impl.frozen:
            scale, _ = GF.affine_params(*self.scaling_impl.ends(), self.bit_width, self.signed)
            self.learned_scale.data = scale.to(self.learned_scale)

    def forward(self, x: Tensor, relu: bool = False, ahead: kernels.Ahead | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bit_width = self.bits
        GF.check_float(x)
        if x.dim() == 0:  # Brevitas's sentinel: metadata only
            if not self.scaling_impl.has_ranges:
                return x, torch.ones_like(x), torch.zeros_like(x), bit_width
            return x, *self._scale_zero_point(*self.scaling_impl.ends()), bit_width
        before = self.clamp.after(relu)
        if self.check_finite or self.observer_only or not self.scaling_impl.frozen:  # somebody looks at what is quantized
            x, before, ahead = before.apply(x, ahead), kernels.IDENTITY, None
        if self.check_finite:
            GF.check_finite(x)
        scale, zero_point = self._grid_for(x)
        if self.observer_only:
            return x, scale, zero_point, bit_width
        learns = scale.requires_grad and torch.is_grad_enabled()
        if not learns and has_stock_arithmetic(self.int_quant):
            axis = self.scaling_impl.channel_axis if x.dim() > 1 else 0
            value = kernels.affine_quantize(x, scale, zero_point, self._limits(), axis, before, ahead)
            return value, scale, zero_point, bit_width
        x = before.apply(x, ahead)
        return self.int_quant(scale, zero_point, bit_width, x).to(x.dtype), scale, zero_point, bit_width

    def quantize_to_integers(self, x: Tensor) -> Tensor:
        """The integers behind the values that ``forward`` returns for x; see :func:`granq_plugin.functional.quantize_to_integers`.

        Raises:
            RuntimeError: while the ranges are not frozen. ValueError: for NaN or Inf.
        """
        if not self.scaling_impl.frozen:
            raise RuntimeError("the ranges are not frozen yet: calibrate first, or load a calibrated state dict")
        x = self.clamp(x)
        scale, zero_point = self._grid_for(x)
        return GF.quantize_to_integers(x, scale, zero_point, self.bit_width, self.signed, self.int_quant.narrow_range)

    def _limits(self) -> tuple[int, int]:
        return GF.integer_limits(self.bit_width, self.signed, self.int_quant.narrow_range)

    def _grid_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for x. Those of frozen ranges are kept for as long as they hold."""
        ranges = self.scaling_impl
        lo, hi = ranges.running_min, ranges.running_max
        if (not ranges.frozen or self.learned_scale is not None or kernels.is_observed()
                or lo.is_inference() or hi.is_inference()):  # which have no versions
            return self._scale_zero_point(*ranges(x))
        shape = x.dim(), x.shape[ranges.channel_axis if x.dim() > 1 else 0]
        if self._grid is None or not self._grid.holds_for(lo, hi, shape):
            with torch.inference_mode(False):  # to be used in training, too
                grid = self._scale_zero_point(*ranges(x))
            self._grid = _Grid(*grid, lo, hi, shape, _versions(*grid, lo, hi))
        return self._grid.scale, self._grid.zero_point

    def _scale_zero_point(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = GF.affine_params(lo, hi, self.bit_width, self.signed)
        if self.learned_scale is not None and self.scaling_impl.frozen:
            if self.learned_scale.numel() == 0:
                self.init_scale()
            learned = abs_binary_sign_grad(self.learned_scale.to(scale.dtype))
            scale = scalar_clamp_min_ste(learned, GF.MIN_RANGE / 2**self.bit_width).view_as(scale)
        return scale, zero_point

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        key = prefix + "learned_scale"
        if self.learned_scale is not None and key in state_dict:
            stored, ranges = state_dict[key], state_dict.get(prefix + "scaling_impl.running_min")
            if ranges is not None and stored.numel() not in (0, ranges.numel()):
                error_msgs.append(f"{key} has {stored.numel()} channels, its ranges have {ranges.numel()}")
            self.learned_scale.data = self.learned_scale.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if config.IGNORE_MISSING_KEYS and key in missing_keys:
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, signed={self.signed}"
