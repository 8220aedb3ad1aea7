"""The losses of zero-shot QAT, each a function of logits or statistics.

Logits are ``[B, classes]``: t the teacher's, q the student's; y the labels ``[B]`` that the images were generated for. The
generator's losses follow AdaDFQ (arXiv 2303.06869), the student's the published GranQ loop (arXiv 2503.18339).
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "agreement_loss",
    "bn_statistics_loss",
    "disagreement_loss",
    "entropy",
    "margin_loss",
    "student_loss",
    "teacher_agreement",
]


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of ``softmax(logits)`` over the last axis: ``[B, classes]`` -> ``[B]``."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def student_loss(t: Tensor, q: Tensor, temperature: float) -> Tensor:
    """``-T^2 mean H(softmax((t - q) / T))``: least where student and teacher differ by the same constant in every class.

    Args:
        t, q: logits; no gradient reaches t. temperature: T > 0.

    Returns:
        A scalar >= ``-T^2 ln(classes)``.
    """
    return -temperature**2 * entropy((t.detach() - q) / temperature).mean()


def margin_loss(t: Tensor, q: Tensor, lower: float, upper: float, floor: Tensor | None = None) -> Tensor:
    """Keep the normalized disagreement of generated images between two margins (AdaDFQ).

    ``h = (H(softmax(t - q)) - floor) / (ln(classes) - floor)``; the loss is ``mean relu(lower - h) + mean relu(h - upper)``.

    Args:
        lower, upper: margins, ``0 <= lower <= upper <= 1``.
        floor: the entropy that counts as 0, a scalar without gradient; None: the least one of the batch.
    """
    h = entropy(t - q)
    floor = h.detach().amin() if floor is None else floor
    h = (h - floor) / (math.log(t.shape[-1]) - floor).clamp_min(torch.finfo(h.dtype).tiny)
    return F.relu(lower - h).mean() + F.relu(h - upper).mean()


def disagreement_loss(t: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """``CE(t - q, y)``: images on which the student misses what the teacher sees of their class."""
    return F.cross_entropy(t - q, y)


def agreement_loss(t: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """``CE(t + q, y)``: images that teacher and student together take for their class."""
    return F.cross_entropy(t + q, y)


def bn_statistics_loss(statistics: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """Mean over BatchNorm layers of ``MSE(batch mean, running mean) + MSE(batch variance, running variance)``.

    Args:
        statistics: ``(mean, var, running_mean, running_var)`` per layer, each ``[C]``, variances biased.
    """
    losses = [F.mse_loss(mean, running_mean) + F.mse_loss(var, running_var) for mean, var, running_mean, running_var in statistics]
    return torch.stack(losses).mean()


def teacher_agreement(t: Tensor, q: Tensor) -> Tensor:
    """Share of the batch, 0 to 1, on which student and teacher predict the same class."""
    return (t.argmax(-1) == q.argmax(-1)).to(torch.float32).mean()
