"""Images in memory: CIFAR as ``.npz`` arrays or in torchvision's folders."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageSet", "load_images", "read_npz"]

CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
_TORCHVISION = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


@dataclass(frozen=True)
class ImageSet:
    """Images and labels.

    Attributes:
        images: uint8 ``[N, 3, H, W]``, RGB. labels: int64 ``[N]``. source: the file or folder they were read from.
        description: what they are, in words without a path.
    """
    images: Tensor
    labels: Tensor
    source: str
    description: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int, seed: int = 0) -> "ImageSet":
        """``count`` images (all, if there are fewer), drawn without replacement; the same ones for the same seed."""
        return self._of(self._order(seed)[:count])

    def split(self, count: int, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """All other images, and the ``count`` that :meth:`subset` draws. Raises a ValueError if none would be left."""
        if count >= len(self):
            raise ValueError(f"cannot hold out {count} of the {len(self)} images of {self.source!r}")
        order = self._order(seed)
        return self._of(order[count:]), self._of(order[:count])

    def _order(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def _of(self, chosen: Tensor) -> "ImageSet":
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images, labels)``, in order; of several ranks, each gets every ``world_size``-th batch."""
        pairs = zip(self.images.split(batch_size), self.labels.split(batch_size))
        return (pair for i, pair in enumerate(pairs) if i % world_size == rank)


def _image_set(x: np.ndarray, y: np.ndarray, source: Path) -> ImageSet:
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"images in {str(source)!r} must be uint8 [N, H, W, 3], got {x.dtype} {list(x.shape)}")
    if y.shape != (len(x), ) or y.dtype.kind not in "iu":
        raise ValueError(f"labels in {str(source)!r} must be integers [{len(x)}], got {y.dtype} {list(y.shape)}")
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    return ImageSet(images, torch.from_numpy(y.astype(np.int64)), str(source))


def read_npz(path: str | Path) -> ImageSet:
    """Read arrays ``x`` (uint8 ``[N, H, W, 3]``, RGB) and ``y`` (integers ``[N]``) from an ``.npz`` file; nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} " + ("is a folder" if path.is_dir() else "does not exist"))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except Exception as e:  # a damaged archive raises anything from zlib.error to MemoryError
        raise ValueError(f"{str(path)!r} is not an .npz file with arrays x and y: {e}") from e
    return _image_set(x, y, path)


def load_images(data_dir: str | Path, dataset: str, split: str = "test") -> ImageSet:
    """Load a CIFAR split from a folder.

    Looked for, in this order: ``DIR/<dataset>/<split>.npz``, ``DIR/<split>.npz`` (see :func:`read_npz`), and torchvision's
    ``cifar-10-batches-py`` or ``cifar-100-python`` in ``DIR`` or ``DIR/<dataset>`` (checked by torchvision's MD5 sums).

    Raises:
        FileNotFoundError: listing what was looked for. ValueError: for an unknown data set, or labels out of range.
    """
    if dataset not in CIFAR_CLASSES:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(CIFAR_CLASSES)}")
    root = Path(data_dir)
    npz = [root / dataset / f"{split}.npz", root / f"{split}.npz"]
    class_name, folder = _TORCHVISION[dataset]
    folders = [root / folder, root / dataset / folder]
    data = next((read_npz(p) for p in npz if p.is_file()), None)
    if data is None:
        found = next((p for p in folders if p.is_dir()), None)
        if found is None:
            looked_for = ", ".join(str(p) for p in npz + folders)
            raise FileNotFoundError(f"no {dataset} {split} images under {str(root)!r}; looked for: {looked_for}")
        import torchvision.datasets
        try:
            stored = getattr(torchvision.datasets, class_name)(found.parent, train=split == "train")
        except RuntimeError as e:
            raise ValueError(f"{str(found)!r} is incomplete or damaged: {e}") from e
        data = _image_set(stored.data, np.asarray(stored.targets), found)
    if len(data) and not 0 <= int(data.labels.min()) <= int(data.labels.max()) < CIFAR_CLASSES[dataset]:
        raise ValueError(
            f"labels in {data.source!r} run from {int(data.labels.min())} to {int(data.labels.max())}; "
            f"{dataset} has 0 to {CIFAR_CLASSES[dataset] - 1}")
    return replace(data, description=f"{dataset} {split} images")
