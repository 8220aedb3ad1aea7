"""Batch statistics at the teacher's BatchNorm layers, from the pass that computes its logits."""

import functools

import torch
from torch import Tensor, nn

from granq_plugin.zero_shot import parallel

__all__ = ["BatchNormStatistics", "batch_norm_layers", "batch_statistics", "observed_batch_norm"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, float32 or wider, in two passes."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.is_cuda:
        return torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)[::-1]
    if x.dim() == 4 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.batch_norm_update_stats(x, None, None, 0.0)  # without the temporary of below, but slow in other layouts
    axes = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(axes, keepdim=True)
    return mean.flatten(), (x - mean).square_().mean(axes)  # torch.var_mean is 10x slower on CPU


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view((1, -1) + (1, ) * (x.dim() - 2))


def _through_statistics(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    """The gradient to x of its mean and variance, in one pass."""
    count = x.numel() // x.shape[1]
    slope = grad_var * (2 / count)
    return torch.addcmul(_per_channel(grad_mean / count - slope * mean, x), x, _per_channel(slope, x))  # wide


class _MeanVar(torch.autograd.Function):
    """Mean and biased variance of every channel."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _mean_var(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        return _through_statistics(x, mean, grad_mean, grad_var).to(x.dtype)


class _FrozenBatchNorm(torch.autograd.Function):
    """``x * scale + shift`` per channel with frozen scale and shift, and the statistics of x; one backward for both."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _mean_var(x)
        ctx.save_for_backward(x, mean, scale)
        return torch.addcmul(_per_channel(shift, x), x, _per_channel(scale, x)).to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
        x, mean, scale = ctx.saved_tensors
        grad = _through_statistics(x, mean, grad_mean, grad_var).addcmul_(grad, _per_channel(scale, x))
        return grad.to(x.dtype), None, None


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over batch, space and ranks, differentiable.

    Args:
        x: ``[B, C, *spatial]``.

    Returns:
        ``(mean, var)``, each ``[C]``, float32 or wider.
    """
    return _over_ranks(*_MeanVar.apply(x))


def _over_ranks(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
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


def observed_batch_norm(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The output of a frozen BatchNorm layer in evaluation mode, and :func:`batch_statistics` of its input."""
    scale = (layer.running_var + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach()
    shift = -layer.running_mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach()
    y, mean, var = _FrozenBatchNorm.apply(x, scale, shift)
    return y, *_over_ranks(mean, var)


class BatchNormStatistics:
    """In the place of the BatchNorm layers' forwards of a frozen teacher; ``take()`` returns what
    :func:`losses.bn_statistics_loss` takes."""

    def __init__(self, teacher: nn.Module) -> None:
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._layers = batch_norm_layers(teacher)
        for layer in self._layers:
            layer.forward = functools.partial(self._forward, layer)

    def _forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        y, mean, var = observed_batch_norm(x, layer)
        self._seen.append((mean, var, layer.running_mean, layer.running_var))
        return y

    def take(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The statistics of the passes since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def remove(self) -> None:
        """Give the layers their own forwards back."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
