"""Batch statistics at the teacher's BatchNorm layers, from the pass that computes its logits."""

import torch
from torch import Tensor, nn

from granq_plugin.zero_shot import parallel

__all__ = ["BatchNormStatistics", "batch_norm_layers", "batch_statistics"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _MeanVar(torch.autograd.Function):
    """Mean and biased variance of every channel; the backward is one pass, ``x * a_c + b_c``."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [d for d in range(x.dim()) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(axes, keepdim=True)
        var = (wide - mean).square_().mean(axes)  # two passes: torch.var_mean's one is 10x slower on CPU
        mean = mean.flatten()
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        shape = (1, -1) + (1, ) * (x.dim() - 2)
        slope = grad_var * (2 / count)
        offset = grad_mean / count - slope * mean
        return torch.addcmul(offset.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over batch, space and ranks, differentiable.

    Args:
        x: ``[B, C, *spatial]``.

    Returns:
        ``(mean, var)``, each ``[C]``, float32 or wider.
    """
    mean, var = _MeanVar.apply(x)
    ranks = parallel.world_size()
    if ranks == 1:
        return mean, var
    moments = parallel.sum_over_ranks(torch.stack([mean, var + mean.square()])) / ranks
    return moments[0], moments[1] - moments[0].square()


def batch_norm_layers(teacher: nn.Module) -> list[nn.Module]:
    """The teacher's BatchNorm layers with running statistics. Raises a ValueError if there is none."""
    layers = [m for m in teacher.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not layers:
        raise ValueError("the teacher has no BatchNorm layer with running statistics, and zero-shot QAT generates its images from "
                         "them: take the network before BatchNorm was folded into its convolutions")
    return layers


class BatchNormStatistics:
    """Hooks on a teacher's BatchNorm layers; ``take()`` returns what :func:`losses.bn_statistics_loss` takes."""

    def __init__(self, teacher: nn.Module) -> None:
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._handles = [m.register_forward_pre_hook(self._record) for m in batch_norm_layers(teacher)]

    def _record(self, layer: nn.Module, inputs: tuple) -> None:
        self._seen.append((*batch_statistics(inputs[0]), layer.running_mean, layer.running_var))

    def take(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The statistics of the passes since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
