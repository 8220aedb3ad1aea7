"""Accuracy of a classifier on images in memory; normalization on batches of tensors, so that loading is no bottleneck."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from granq_plugin.freeze import weights_quantized_once
from granq_plugin.fusion import fuse_batch_norm
from granq_plugin.zero_shot import parallel
from granq_plugin.zero_shot.graphs import RecordedStep, check_device
from zoo.card import Preprocessing
from zoo.data import ImageSet
from zoo.image_folder import FolderImages

__all__ = ["Accuracy", "check_compile", "check_images", "default_batch_size", "evaluate", "input_batches", "wilson_interval"]

_COMPILE = ("off", "cudagraphs")


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

    def line(self, count: int) -> str:
        """A count with its percentage and 95 % interval."""
        low, high = wilson_interval(count, self.total)
        return f"{100 * count / self.total:6.2f} %  (95 % interval {low:.2f} to {high:.2f})  {count} of {self.total}"


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion, in percent (Wilson 1927): of the accuracy on images of this kind.

    Example:
        >>> "%.2f to %.2f" % wilson_interval(9173, 10000)
        '91.17 to 92.25'
    """
    z = 1.959963984540054
    p, z2n = correct / total, z * z / total
    centre, half = p + z2n / 2, z * (p * (1 - p) / total + z2n / total / 4)**0.5
    low, high = ((centre - half) / (1 + z2n), (centre + half) / (1 + z2n))
    return 100 * max(min(low, p), 0.0), 100 * min(max(high, p), 1.0)  # rounding must not put an end past 0, 1 or p


def default_batch_size(preprocessing: Preprocessing) -> int:
    """Images of a forward: 250, or 50 of 64 pixels and more."""
    return 250 if preprocessing.image_size < 64 else 50


def check_compile(compile: str, device: torch.device, world: int = 1) -> None:
    """Raise what :func:`evaluate` raises for a ``compile`` that is unknown, or cannot be on this device, or in one of ``world``
    processes."""
    if compile not in _COMPILE:
        raise ValueError(f"compile must be one of {', '.join(_COMPILE)}, got {compile!r}")
    if compile == "cudagraphs":
        check_device(device, "network", world)


def check_images(data: "ImageSet | FolderImages", preprocessing: Preprocessing) -> None:
    """Raise what :func:`evaluate` would raise of the first image, before a training whose end would be too late.

    Raises:
        ValueError: if there are no images, or they have the wrong size or number of channels.
    """
    if not len(data):
        raise ValueError(f"no images in {data.source!r}")
    preprocessing(next(iter(data.batches(1)))[0])


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
        data: "ImageSet | FolderImages",
        preprocessing: Preprocessing,
        batch_size: int = 250,
        device: torch.device | str = "cpu",
        progress: Callable[[int], object] | None = None,
        distributed: bool = False,
        compile: str = "off") -> Accuracy:
    """Count correct predictions of ``model`` (left in evaluation mode) on every image of ``data``.

    Args:
        progress: called after each batch with its number of images (of this rank).
        distributed: share the batches among the ranks of torch.distributed and add up, so that every rank returns the counts of
            one process; all ranks must call this. The batches are those of one process.
        compile: "off", or "cudagraphs" (one GPU): the forward of a batch, some hundred launches in a network of low bits, is
            recorded and then launched as one; the last batch, if it is smaller, is not. The network must read nothing back.

    Raises:
        ValueError: if there are no images, or they have the wrong size; for an unknown ``compile``, or one that cannot be here.

    Example:
        >>> from zoo import get_model
        >>> from zoo.data import load_images
        >>> model = get_model("resnet8_digits", pretrained=True)
        >>> evaluate(model, load_images(None, "digits"), model.card.preprocessing).total
        359
    """
    if not len(data):
        raise ValueError(f"no images in {data.source!r}")
    rank, world = (parallel.rank(), parallel.world_size()) if distributed else (0, 1)
    check_compile(compile, torch.device(device), world)
    model = fuse_batch_norm(model.to(device).eval())
    whole = RecordedStep(model, warm_up=1) if compile == "cudagraphs" else model
    hits, seen = torch.zeros(2, dtype=torch.int64, device=device), 0
    start = time.perf_counter()
    with weights_quantized_once(model):
        for images, y in data.batches(batch_size, rank, world):
            images, labels = images.to(device), y.to(device)[:, None]  # both before there is work that a copy would wait for
            logits = (whole if len(y) == batch_size else model)(preprocessing(images))
            is_hit = logits.topk(min(5, logits.shape[1])).indices == labels
            hits += torch.stack([is_hit[:, 0].sum(), is_hit.sum()])  # stays there
            seen += len(y)
            if progress:
                progress(len(y))
    counts = torch.tensor([*hits.tolist(), seen])
    if world > 1:
        shared = counts.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(shared)
        counts = shared.cpu()
    return Accuracy(*counts.tolist(), time.perf_counter() - start)
