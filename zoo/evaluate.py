"""Accuracy of a classifier on images in memory; normalization on batches of tensors, so that loading is no bottleneck."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.data import ImageSet
from zoo.card import Preprocessing

__all__ = ["Accuracy", "evaluate", "input_batches"]


@dataclass(frozen=True)
class Accuracy:
    """Counts over a test set. ``top1`` and ``top5`` are percentages; seconds is wall time."""
    correct: int
    correct5: int
    total: int
    seconds: float

    @property
    def top1(self) -> float:
        return 100 * self.correct / self.total

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / self.total

    @property
    def images_per_second(self) -> float:
        return self.total / self.seconds


def input_batches(
        images: Tensor, preprocessing: Preprocessing, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Normalized float32 batches ``[B, C, S, S]`` of uint8 images ``[N, C, S, S]``.

    Raises:
        ValueError: for images of another size than the network's.
    """
    for batch in images.split(batch_size):
        yield preprocessing(batch.to(device))


@torch.no_grad()
def evaluate(
        model: nn.Module,
        data: ImageSet,
        preprocessing: Preprocessing,
        batch_size: int = 250,
        device: torch.device | str = "cpu",
        progress: Callable[[int], object] | None = None) -> Accuracy:
    """Count correct predictions of ``model`` (left in evaluation mode) on every image of ``data``.

    Args:
        progress: called after each batch with its number of images.

    Raises:
        ValueError: if there are no images, or they have the wrong size.
    """
    if not len(data):
        raise ValueError(f"no images in {data.source!r}")
    model = model.to(device).eval()
    correct = correct5 = 0
    start = time.perf_counter()
    for x, y in zip(input_batches(data.images, preprocessing, batch_size, device), data.labels.split(batch_size)):
        logits = model(x)
        hits = logits.topk(min(5, logits.shape[1])).indices.cpu() == y[:, None]
        correct += int(hits[:, 0].sum())
        correct5 += int(hits.sum())
        if progress:
            progress(len(y))
    return Accuracy(correct, correct5, len(data), time.perf_counter() - start)
