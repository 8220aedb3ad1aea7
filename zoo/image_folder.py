"""Image files in class folders, decoded batch by batch: a large test set does not fit into memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from granq_plugin.reading import reason_of
from zoo.card import Preprocessing

__all__ = ["FolderImages", "class_folders", "fixed_order", "read_folder"]

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")  # as torchvision's ImageFolder, in lower case

MOST_PIXELS = 2**26
"""Of an image, decoded or resized: 200 MB."""


def fixed_order(count: int, seed: int = 0) -> Tensor:
    """The numbers below ``count`` in an order that is random, and the same for the same seed: its first are a sample."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class FolderImages:
    """Image files and labels, with ``subset`` and ``batches`` as :class:`zoo.data.ImageSet` has them.

    Attributes:
        files: in the order of their classes, then names. labels: int64 ``[N]``. preprocessing: its resize and crop are applied.
        source: the folder. description: what they are, in words.
    """
    files: tuple[Path, ...]
    labels: Tensor
    preprocessing: Preprocessing
    source: str
    description: str = ""

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def images(self) -> Tensor:
        """All of them, uint8 ``[N, C, S, S]``: for subsets."""
        return torch.cat([images for images, _ in self.batches(256)])

    def subset(self, count: int, seed: int = 0) -> "FolderImages":
        """``count`` images (all, if there are fewer), drawn without replacement; the same ones for the same seed."""
        chosen = fixed_order(len(self), seed)[:count]
        return replace(self, files=tuple(self.files[i] for i in chosen), labels=self.labels[chosen])

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images, labels)``, in order; of several ranks, each gets every ``world_size``-th batch. The next one is decoded
        while the caller works on the last."""
        starts = range(rank * batch_size, len(self), world_size * batch_size)
        with ThreadPoolExecutor(4) as pool:

            def submit(start: int):
                return [pool.submit(self._decoded, f) for f in self.files[start:start + batch_size]]
            coming = submit(starts[0]) if starts else []
            for i, start in enumerate(starts):
                images, coming = coming, submit(starts[i + 1]) if i + 1 < len(starts) else []
                yield torch.stack([image.result() for image in images]), self.labels[start:start + batch_size]

    def _decoded(self, file: Path) -> Tensor:
        from PIL import Image
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import center_crop, resize
        size = self.preprocessing.image_size
        try:
            with Image.open(file) as stored:
                self._check_pixels(*stored.size)
                image = stored.convert("L" if self.preprocessing.channels == 1 else "RGB")
        except Exception as e:  # a damaged file raises anything from struct.error to SyntaxError
            raise ValueError(f"{str(file)!r} is not a readable image: {reason_of(e)}") from e
        if self.preprocessing.resize is not None:
            image = resize(image, self.preprocessing.resize, InterpolationMode(self.preprocessing.interpolation))
        if min(image.size) < size:
            raise ValueError(f"{str(file)!r} is {image.size[1]}x{image.size[0]}, the network takes {size}x{size}")
        pixels = torch.from_numpy(np.array(center_crop(image, size)))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


    def _check_pixels(self, width: int, height: int) -> None:
        """Before anything is decoded; a narrow image grows when its shorter side is resized."""
        short = min(width, height)
        if short < 1 or width * height * max(1, (self.preprocessing.resize or 0) / short)**2 > MOST_PIXELS:
            raise ValueError(f"it has {width}x{height} pixels, more than {MOST_PIXELS:,} when it is resized")


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders with image files, sorted by name."""
    return sorted(f for f in folder.iterdir() if f.is_dir() and any(map(_is_image, f.iterdir())))


def _is_image(path: Path) -> bool:
    """By its name; a folder or a pipe is none."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read_folder(folder: str | Path, preprocessing: Preprocessing, num_classes: int) -> FolderImages:
    """Image files in class folders.

    Names that are all whole numbers are class ids (folders may be missing); other names are classes in sorted order, as in
    torchvision's ImageFolder and ImageNet's wnids, and there must be ``num_classes`` of them. Images that are all of one square
    size below ``preprocessing.resize`` were resized before: they are only cropped.

    Raises:
        FileNotFoundError: if there are no class folders. ValueError: for class ids out of range, or too few classes.
    """
    folder = Path(folder)
    classes = class_folders(folder) if folder.is_dir() else []
    if not classes:
        raise FileNotFoundError(f"{str(folder)!r} holds no class folders with images ({', '.join(SUFFIXES)})")
    if all(f.name.isdecimal() for f in classes):
        ids = [int(f.name) for f in classes]
        bad = [f.name for f, i in zip(classes, ids) if i >= num_classes]
        if bad:
            raise ValueError(f"class folder {bad[0]!r} in {str(folder)!r} is out of range: classes are 0 to {num_classes - 1}")
    elif len(classes) == num_classes:
        ids = range(num_classes)
    else:
        raise ValueError(f"{str(folder)!r} has {len(classes)} class folders, the network has {num_classes} classes: name them by "
                         "class id (0, 1, ...) where some are missing")
    pairs = [(f, i) for c, i in zip(classes, ids) for f in sorted(c.iterdir()) if _is_image(f)]
    files, labels = zip(*sorted(pairs, key=lambda pair: (pair[1], pair[0].name)))
    words, side = f"{folder.parent.name}/{folder.name}", _common_side(files)
    if preprocessing.resize is not None and side is not None and preprocessing.image_size <= side < preprocessing.resize:
        preprocessing = replace(preprocessing, resize=None)
        words += f", centre crop of {side}x{side}"
    return FolderImages(files, torch.tensor(labels), preprocessing, str(folder), words)


def _common_side(files: tuple[Path, ...]) -> int | None:
    """The side of the images, if 32 of them, evenly spread, are squares of one size."""
    from PIL import Image
    sizes = set()
    for file in files[::max(1, len(files) // 32)]:
        try:
            with Image.open(file) as image:
                sizes.add(image.size)
        except Exception:
            return None  # decoding tells which
    width, height = sizes.pop()
    return width if not sizes and width == height else None
