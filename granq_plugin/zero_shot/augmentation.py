"""Random changes of images that a network shall not mind."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_crop_flip", "random_gain"]


def random_crop_flip(images: Tensor, padding: int, flip: bool, rng: torch.Generator) -> Tensor:
    """Crop every image of a batch at its own random place after zero padding, and mirror every second one, at random.

    Args:
        images: ``[B, C, H, W]``, of any dtype, on the CPU or a GPU. rng: on the CPU; decides the same on every device.

    Returns:
        ``[B, C, H, W]``.
    """
    count, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count), generator=rng)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, generator=rng) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (padding, ) * 4)
    index = (torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None], rows[:, None, :, None],
             columns[:, None, None, :])
    return padded[tuple(i.to(images.device) for i in index)]


def random_gain(images: Tensor, most: float, rng: torch.Generator) -> Tensor:
    """Multiply every image of a batch by its own random factor, whose logarithm is uniform: ``1 / most`` to ``most``.

    Args:
        images: floating point ``[B, ...]``; of normalized ones the contrast changes, about the data set's mean.
        most: at least 1. rng: on the CPU; decides the same on every device.
    """
    exponents = 2 * torch.rand(len(images), generator=rng) - 1
    factors = torch.exp(math.log(most) * exponents).to(images)
    return images * factors.view(-1, *[1] * (images.dim() - 1))
