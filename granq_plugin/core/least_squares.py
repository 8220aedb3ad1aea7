"""Ranges of least squared error: at few bits the outermost values cost the others more than they are worth."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["errors_of_shares", "least_error_range"]


def errors_of_shares(
        x: Tensor, lo: Tensor, hi: Tensor, shares: Sequence[float], quantize: Callable[[Tensor, Tensor, Tensor], Tensor],
        axes: Sequence[int]) -> Tensor:
    """Squared error of x relative to its range, summed over ``axes``, for each share of that: ``[len(shares), *lo.shape]``.

    Args:
        lo, hi: broadcastable to x; ``quantize(x, share * lo, share * hi)`` returns what becomes of x.
    """
    size = torch.maximum(-lo, hi)  # squares of what is far from 1 would leave float32
    size = torch.where(size > 0, size, 1)
    squares = ((quantize(x, share * lo, share * hi) - x).div_(size).square_() for share in shares)
    return torch.stack([s.sum(axes, keepdim=True) if axes else s for s in squares])


def least_error_range(lo: Tensor, hi: Tensor, shares: Sequence[float], errors: Tensor) -> tuple[Tensor, Tensor]:
    """``(lo, hi)``, each channel's times the first of the shares with its least error; NaN stays."""
    best, share = errors.argmin(0), torch.full_like(lo, shares[0])
    for i, s in enumerate(shares[1:], 1):  # no copy from the host, for which a GPU would wait
        share = torch.where(best == i, s, share)
    return share * lo, share * hi
