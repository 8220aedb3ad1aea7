"""Where ranges come from: the ``scaling_impl`` of an activation quantizer.

Brevitas's graph mode aligns the operands of a residual addition by injecting one quantizer's ``scaling_impl`` into the others.
"""

import torch
import torch.distributed as dist
from brevitas import config
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin import kernels
from granq_plugin.core.least_squares import errors_of_shares, least_error_range

__all__ = ["CollectedRange", "DynamicRange"]

RANGE_MODES = ("ema", "minmax", "mse")
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of a batch's range, which "mse" tries


class DynamicRange(nn.Module):
    """Ranges that follow the data: nothing to keep, and nothing that aligned quantizers could share but this mark."""

    def __init__(self) -> None:  # Brevitas's injection refuses nn.Module's own *args, **kwargs
        super().__init__()


class CollectedRange(nn.Module):
    """Per-channel ranges of the batches seen in training mode, until they are frozen; frozen ranges stay.

    Buffers start empty and take their shape ``[1, C, 1, ...]`` at the first batch or from a state dict. The state (ranges, number
    of batches, frozen or not) is saved, so that a run resumes in the middle of collecting.

    Args:
        range_mode, momentum, collect_stats_steps, channel_axis, sync_ranges, signed, narrow_range: see
            :class:`~granq_plugin.core.static.StaticGranQ`.
        bit_width: for which "mse" seeks ranges; the other modes do not look at it.
    """

    def __init__(
            self,
            range_mode: str = "ema",
            momentum: float | None = 0.1,
            collect_stats_steps: int = 300,
            channel_axis: int = 1,
            sync_ranges: bool = True,
            bit_width: int = 8,
            signed: bool = False,
            narrow_range: bool = False) -> None:
        super().__init__()
        if range_mode not in RANGE_MODES:
            raise ValueError(f"range_mode must be one of {', '.join(RANGE_MODES)}, got {range_mode!r}")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1] or None (plain average), got {momentum!r}")
        if collect_stats_steps < 1:
            raise ValueError(f"collect_stats_steps must be at least 1, got {collect_stats_steps!r}")
        self.range_mode = range_mode
        self.momentum = momentum
        self.collect_stats_steps = collect_stats_steps
        self.channel_axis = channel_axis
        self.sync_ranges = sync_ranges
        self.bit_width, self.signed, self.narrow_range = bit_width, signed, narrow_range
        self.counter = 0
        self.frozen = False
        self.register_buffer("running_min", torch.empty(0))
        self.register_buffer("running_max", torch.empty(0))

    @property
    def has_ranges(self) -> bool:
        return self.running_min.numel() > 0

    def check_has_ranges(self) -> None:
        """Raise a RuntimeError if no batch has been seen and no state dict loaded."""
        if not self.has_ranges:
            raise RuntimeError(
                "GranQActPerChannelStatic has no ranges yet: run at least one batch in training mode or under "
                "brevitas.graph.calibrate.calibration_mode, or load a calibrated state dict")

    def init_scale(self) -> None:
        """Freeze the ranges (Brevitas calls this at the end of ``calibration_mode``). Without any, nothing happens.

        Raises:
            ValueError: if a collected range is NaN or Inf.
        """
        if self.frozen or not self.has_ranges:
            return
        self.check_finite()
        self.frozen = True

    def check_finite(self, where: str = "") -> None:
        """Raise a ValueError, which begins with ``where``, if a collected range is NaN or Inf."""
        bad = int((~(torch.isfinite(self.running_min) & torch.isfinite(self.running_max))).sum())
        if bad:
            raise ValueError(
                f"{where}{bad} of {self.running_min.numel()} channel ranges are NaN or Inf: calibration data was not finite")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Collect from ``x`` where that is due, and return ``(lo, hi)``, broadcastable to x, in float32 or wider."""
        if self.training and not self.frozen:
            if self.counter < self.collect_stats_steps:
                self._collect(x)
            else:
                self.init_scale()
        self.check_has_ranges()
        shape = self._range_shape(x)
        if shape.numel() != self.running_min.numel():
            raise ValueError(
                f"ranges were collected for {self.running_min.numel()} channels, got an input with {shape.numel()} on axis "
                f"{self.channel_axis}: an activation called at several places needs one module for each, and channels that stand "
                "elsewhere need channel_axis")
        lo, hi = self.ends()
        return lo.view(shape), hi.view(shape)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The ranges in the shape in which they were collected, in float32 or wider (the buffers follow ``module.half()``)."""
        dtype = torch.promote_types(self.running_min.dtype, torch.float32)
        return self.running_min.to(dtype), self.running_max.to(dtype)

    def _range_shape(self, x: Tensor) -> torch.Size:
        axis = self.channel_axis if x.dim() > 1 else 0
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        return torch.Size(shape)

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        distributed = self.sync_ranges and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if x.numel() > 0:
            lo, hi = GF.channel_range(x, self.channel_axis, per_sample=False)
        elif distributed:  # the neutral element: another rank may have data
            lo = torch.full(self._range_shape(x), float("inf"), device=x.device)
            hi = -lo
        else:
            return
        if distributed:
            ends = torch.stack([-lo, hi])
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            lo, hi = -ends[0], ends[1]
        if self.range_mode == "mse":
            lo, hi = self._least_error(x, lo, hi, distributed)
        if not self.has_ranges:
            self._resize(lo.shape)
            self.running_min.copy_(lo)
            self.running_max.copy_(hi)
        elif self.running_min.numel() == lo.numel():  # otherwise forward() complains
            lo, hi = lo.view_as(self.running_min).to(self.running_min), hi.view_as(self.running_max).to(self.running_max)
            if self.range_mode == "minmax":
                torch.minimum(self.running_min, lo, out=self.running_min)
                torch.maximum(self.running_max, hi, out=self.running_max)
            else:
                weight = 1 / (self.counter + 1) if self.momentum is None else self.momentum
                self.running_min.lerp_(lo, weight)
                self.running_max.lerp_(hi, weight)
        self.counter += 1

    def _least_error(self, x: Tensor, lo: Tensor, hi: Tensor, distributed: bool) -> tuple[Tensor, Tensor]:
        axis = self.channel_axis % x.dim() if x.dim() > 1 else 0
        bit_width = GF.check_bit_width(self.bit_width)
        limits = GF.integer_limits(bit_width, self.signed, self.narrow_range)

        def quantize(x, lo, hi):
            return kernels.affine_quantize(x, *GF.affine_params(lo, hi, bit_width, self.signed), limits, axis)

        errors = errors_of_shares(x.to(lo.dtype), lo, hi, _SHARES, quantize, [d for d in range(x.dim()) if d != axis])
        if distributed:
            dist.all_reduce(errors)
        return least_error_range(lo, hi, _SHARES, errors)

    def _resize(self, shape) -> None:
        for buffer in (self.running_min, self.running_max):
            buffer.resize_(shape)  # in place: DDP keeps references

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.counter, int(self.frozen)])

    def set_extra_state(self, state: Tensor) -> None:
        self.counter, self.frozen = int(state[0]), bool(state[1])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        if prefix + "running_min" in state_dict:
            self._resize(state_dict[prefix + "running_min"].shape)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if config.IGNORE_MISSING_KEYS:  # as Brevitas's own: a float layer's state is being loaded
            missing_keys[:] = [k for k in missing_keys if not k.startswith(prefix)]

    def extra_repr(self) -> str:
        return f"range_mode={self.range_mode!r}, {self.running_min.numel()} channels{', frozen' if self.frozen else ''}"
