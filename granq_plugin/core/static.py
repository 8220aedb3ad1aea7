"""Static per-channel activations: ranges collected, then frozen. Integer arithmetic is Brevitas's own ``IntQuant``."""

import torch
import torch.distributed as dist
from brevitas.function.ops_ste import abs_binary_sign_grad, scalar_clamp_min_ste
from torch import Tensor, nn

from granq_plugin import functional as GF
from granq_plugin.core.base import ActClamp, GranQBase

__all__ = ["StaticGranQ"]

RANGE_MODES = ("ema", "minmax")


class StaticGranQ(GranQBase):
    """Per-channel ranges collected over batches, then frozen.

    While in training mode, the first ``collect_stats_steps`` batches update the ranges and are quantized with what has been
    collected so far; then the ranges freeze. Brevitas's ``calibration_mode`` collects for as long as it lasts, averages instead
    of the EMA, and freezes at its end. No shape is needed: buffers take theirs at the first batch or from a state dict.

    Args:
        int_quant: Brevitas's IntQuant. int_scaling_impl: reachable for graph mode, not used.
        bit_width: k, from 1 to 16.
        signed: False: asymmetric unsigned, zero point 0 after a ReLU. True: symmetric, zero point 0.
        narrow_range: only with signed; use -(2^(k-1) - 1) as the lowest integer.
        range_mode: "ema" (moving average of the batches' ranges) or "minmax" (their union).
        momentum: weight of the newest batch in the EMA, in (0, 1]; None: plain average of all batches.
        collect_stats_steps: batches to collect in training mode before freezing, at least 1.
        learned_scale: after freezing, the scale is a parameter, trained through the rounding (as in LSQ).
        channel_axis, min_val, max_val, check_finite: as for :class:`~granq_plugin.core.dynamic.DynamicGranQ`.
        sync_ranges: under torch.distributed, collect over the batches of all ranks, so that ranges stay equal. All ranks
            must then run the same number of collecting forwards.

    Returns:
        ``(value, scale, zero_point, bit_width)``, scale of shape ``[1, C, 1, ...]``.
    """

    def __init__(
            self,
            int_quant: nn.Module,
            int_scaling_impl: nn.Module,
            bit_width: int,
            signed: bool = False,
            narrow_range: bool = False,
            range_mode: str = "ema",
            momentum: float | None = 0.1,
            collect_stats_steps: int = 300,
            learned_scale: bool = False,
            channel_axis: int = 1,
            min_val: float | None = None,
            max_val: float | None = None,
            check_finite: bool = False,
            sync_ranges: bool = True) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width)
        if range_mode not in RANGE_MODES:
            raise ValueError(f"range_mode must be one of {', '.join(RANGE_MODES)}, got {range_mode!r}")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1] or None (plain average), got {momentum!r}")
        if collect_stats_steps < 1:
            raise ValueError(f"collect_stats_steps must be at least 1, got {collect_stats_steps!r}")
        GF.check_symmetric(signed, self.bit_width)
        if narrow_range and not signed:
            raise ValueError("narrow_range=True needs signed=True")
        self.signed = signed
        self.range_mode = range_mode
        self.momentum = momentum
        self.collect_stats_steps = collect_stats_steps
        self.channel_axis = channel_axis
        self.check_finite = check_finite
        self.sync_ranges = sync_ranges
        self.clamp = ActClamp(min_val, max_val)
        self.counter = 0
        self.frozen = False
        self.register_buffer("running_min", torch.empty(0))
        self.register_buffer("running_max", torch.empty(0))
        self.learned_scale = nn.Parameter(torch.empty(0)) if learned_scale else None

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
        if not self.has_ranges or self.frozen:
            return
        bad = int((~torch.isfinite(self.running_max - self.running_min)).sum())
        if bad:
            raise ValueError(f"{bad} of {self.running_min.numel()} channel ranges are NaN or Inf: calibration data was not finite")
        if self.learned_scale is not None:
            self.learned_scale.data = self._affine_params()[0].to(self.learned_scale)
        self.frozen = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bit_width = self.msb_clamp_bit_width_impl()
        if x.dim() == 0:  # Brevitas's sentinel: metadata only
            scale, zero_point = self.scale_zero_point() if self.has_ranges else (torch.ones_like(x), torch.zeros_like(x))
            return x, scale, zero_point, bit_width
        x = self.clamp(x)
        if self.check_finite:
            GF.check_finite(x)
        if self.training and not self.frozen:
            if self.counter < self.collect_stats_steps:
                self._collect(x)
            else:
                self.init_scale()
        self.check_has_ranges()
        scale, zero_point = self.scale_zero_point(x.dim())
        if self.observer_only:
            return x, scale, zero_point, bit_width
        y = self.int_quant(scale, zero_point, bit_width, x)
        return y.to(x.dtype), scale, zero_point, bit_width

    def scale_zero_point(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are used now, broadcastable to an ``ndim``-D input (default: the shape collected)."""
        scale, zero_point = self._affine_params()
        if self.learned_scale is not None and self.frozen:
            min_scale = GF.MIN_RANGE / 2**self.bit_width
            scale = scalar_clamp_min_ste(abs_binary_sign_grad(self.learned_scale.to(scale)), min_scale)
        elif self.learned_scale is not None and self.training:
            scale = scale + 0. * self.learned_scale.sum()  # a gradient of zero, so that DDP finds no unused parameter
        if ndim is not None and ndim != scale.dim():
            shape = [1] * ndim
            shape[self.channel_axis if ndim > 1 else 0] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        return scale, zero_point

    def _affine_params(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.running_min.dtype, torch.float32)  # the buffers follow module.half()
        return GF.affine_params(self.running_min.to(dtype), self.running_max.to(dtype), self.bit_width, self.signed)

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        distributed = self.sync_ranges and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        lo, hi = self._batch_range(x)
        if distributed:
            ends = torch.stack([-lo, hi])
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            lo, hi = -ends[0], ends[1]
        elif x.numel() == 0:
            return
        if not self.has_ranges:
            self._resize(lo.shape)
            self.running_min.copy_(lo)
            self.running_max.copy_(hi)
        elif self.running_min.numel() != lo.numel():
            raise ValueError(
                f"ranges were collected for {self.running_min.numel()} channels, got an input with {lo.numel()}: an activation "
                "that is called at several places needs one module for each")
        elif self.range_mode == "minmax":
            torch.minimum(self.running_min, lo.view_as(self.running_min), out=self.running_min)
            torch.maximum(self.running_max, hi.view_as(self.running_max), out=self.running_max)
        else:
            weight = 1 / (self.counter + 1) if self.momentum is None else self.momentum
            self.running_min.lerp_(lo.view_as(self.running_min).to(self.running_min), weight)
            self.running_max.lerp_(hi.view_as(self.running_max).to(self.running_max), weight)
        self.counter += 1

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.numel() == 0:  # the neutral element: another rank may have data
            shape = [1] * x.dim()
            shape[self.channel_axis if x.dim() > 1 else 0] = x.shape[self.channel_axis if x.dim() > 1 else 0]
            lo = x.new_full(shape, float("inf"), dtype=torch.promote_types(x.dtype, torch.float32))
            return lo, -lo
        return GF.channel_range(x, self.channel_axis, per_sample=False)

    def _resize(self, shape) -> None:
        for buffer in (self.running_min, self.running_max):
            buffer.resize_(shape)  # in place: DDP and the optimizer keep references

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.counter, int(self.frozen)])

    def set_extra_state(self, state: Tensor) -> None:
        self.counter, self.frozen = int(state[0]), bool(state[1])

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if prefix + "running_min" in state_dict:
            self._resize(state_dict[prefix + "running_min"].shape)
        if self.learned_scale is not None and prefix + "learned_scale" in state_dict:
            self.learned_scale.data = torch.empty_like(
                state_dict[prefix + "learned_scale"], dtype=self.learned_scale.dtype, device=self.learned_scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        channels = self.running_min.numel() or "no"
        return (f"bit_width={self.bit_width}, signed={self.signed}, range_mode={self.range_mode!r}, "
                f"{channels} ranges{', frozen' if self.frozen else ''}")
