"""Data parallelism over torch.distributed, exact: what is a mean over the batch in one process stays one over all ranks.

Without an initialized process group every function is the identity of one rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["alone", "average_", "from_first_rank", "gather", "least", "rank", "shard", "sum_over_ranks", "world_size"]

_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For what a rank computes by itself, whatever the others do, or when they have gone: one rank is all there is."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def shard(x: Tensor) -> Tensor:
    """This rank's part of a global batch (axis 0), which world_size() divides."""
    return x.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """The global batch of every rank's equally large ``x``, in the order of :func:`shard`; without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _SumOverRanks(torch.autograd.Function):
    """Sum forward and backward: every rank's loss depends on every rank's x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def sum_over_ranks(x: Tensor) -> Tensor:
    """Differentiable sum of ``x`` over all ranks."""
    return x if world_size() == 1 else _SumOverRanks.apply(x)


def least(x: Tensor) -> Tensor:
    """The least of a scalar over all ranks, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MIN)
    return x


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the ranks, in one message per dtype."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):  # not a set: its order differs from rank to rank
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for t, mean in zip(group, flat.split([t.numel() for t in group])):
            t.copy_(mean.view_as(t))


def from_first_rank(function: Callable):
    """What ``function`` returns on rank 0, on every rank; if it raises there, every rank raises a RuntimeError."""
    if world_size() == 1:
        return function()
    outcome, error = [None, None], None
    if rank() == 0:
        try:
            outcome = [function(), None]
        except Exception as e:
            error, outcome = e, [None, f"{type(e).__name__}: {e}"]
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]
