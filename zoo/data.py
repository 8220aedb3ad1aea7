"""Test and training images: ``.npz`` arrays, torchvision's CIFAR folders, folders of image files, scikit-learn's digits."""

import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from granq_plugin.reading import existing_file, reason_of
from zoo.card import DATASETS, Card
from zoo.image_folder import FolderImages, class_folders, fixed_order, read_folder

__all__ = ["BUNDLED", "ImageSet", "in_memory", "load_digits", "load_images", "read_npz"]

BUNDLED = ("digits", )
"""Data sets that come with a package of the ``zoo`` extra: no folder is needed."""

_TORCHVISION = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


SPLITS = ("test", "train")
_SMALL = 2**28
_MOST_COMPRESSED = 20
"""An archive of more than _SMALL bytes is not compressed better than this: images are not, a bomb is."""


@dataclass(frozen=True)
class ImageSet:
    """Images and labels.

    Attributes:
        images: uint8 ``[N, 3, H, W]``, RGB, or grey ``[N, 1, H, W]``.
        labels: int64 ``[N]``. source: the file or folder they were read from.
        description: what they are, in words without a path.

    Raises:
        TypeError: for tensors of other types or shapes.
    """
    images: Tensor
    labels: Tensor
    source: str
    description: str = ""

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.dim() != 4:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"images must be a uint8 tensor [N, C, H, W], got {got}")
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
            got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"labels of {len(x)} images must be an int64 tensor [{len(x)}], got {got}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int, seed: int = 0) -> "ImageSet":
        """``count`` images (all, if there are fewer), drawn without replacement; the same ones for the same seed."""
        return self._of(fixed_order(len(self), seed)[:count])

    def split(self, count: int, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """All other images, and the ``count`` that :meth:`subset` draws. Raises a ValueError if none would be left."""
        if count >= len(self):
            raise ValueError(f"cannot hold out {count} of the {len(self)} images of {self.source!r}")
        order = fixed_order(len(self), seed)
        return self._of(order[count:]), self._of(order[:count])

    def _of(self, chosen: Tensor) -> "ImageSet":
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images, labels)``, in order; of several ranks, each gets every ``world_size``-th batch."""
        pairs = zip(self.images.split(batch_size), self.labels.split(batch_size))
        return (pair for i, pair in enumerate(pairs) if i % world_size == rank)


def _image_set(x: np.ndarray, y: np.ndarray, source: Path) -> ImageSet:
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(f"images in {str(source)!r} must be uint8 [N, H, W, 3] or [N, H, W, 1], got {x.dtype} {list(x.shape)}")
    if y.shape != (len(x), ) or y.dtype.kind not in "iu":
        raise ValueError(f"labels in {str(source)!r} must be integers [{len(x)}], got {y.dtype} {list(y.shape)}")
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    return ImageSet(images, torch.from_numpy(y.astype(np.int64)), str(source))


def read_npz(path: str | Path) -> ImageSet:
    """Read arrays ``x`` (uint8 ``[N, H, W, 3]``, RGB, or ``[N, H, W, 1]``) and ``y`` (integers ``[N]``) from an ``.npz`` file.

    Nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it is not such a file.
    """
    path = existing_file(path, "data file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(i.file_size for i in archive.infolist())
        if unpacked > max(_SMALL, _MOST_COMPRESSED * path.stat().st_size):
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than images ever do")
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except Exception as e:  # a damaged archive raises anything from zlib.error to MemoryError
        raise ValueError(f"{str(path)!r} is not an .npz file with arrays x and y: {reason_of(e)}") from e
    return _image_set(x, y, path)


def load_digits(split: str = "test") -> ImageSet:
    """scikit-learn's handwritten digits (UCI optdigits), uint8 ``[N, 1, 8, 8]``: grey levels 0 to 16 spread over 0 to 255.

    The test set is the last fifth of each class in the order of the file, 359 of 1,797 images; it never changes.

    Raises:
        ValueError: for another split than "train" and "test". ModuleNotFoundError: without scikit-learn (extra ``zoo``).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    try:
        import sklearn.datasets
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"the digits come with scikit-learn: pip install 'granq-plugin[zoo]' ({e})", name=e.name) from e
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    of_class = np.zeros(len(y), np.int64)  # which of its class an image is
    for digit in range(10):
        of_class[y == digit] = np.arange((y == digit).sum())
    count = np.bincount(y)[y]
    chosen = (of_class >= count - np.round(count / 5)) == (split == "test")
    images = torch.from_numpy(np.round(x[chosen] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return ImageSet(images, torch.from_numpy(y[chosen].astype(np.int64)), "scikit-learn", f"digits {split} images")


def load_images(
        data_dir: str | Path | None,
        dataset: str,
        split: str = "test",
        *,
        card: Card | None = None,
        download: bool = False) -> "ImageSet | FolderImages":
    """Load a split of a data set from a folder, or of the digits, which need none (``data_dir`` is not looked at).

    Looked for, in this order: arrays in ``DIR/<dataset>/<split>.npz`` or ``DIR/<split>.npz`` (see :func:`read_npz`); torchvision's
    ``cifar-10-batches-py`` or ``cifar-100-python`` in ``DIR`` or ``DIR/<dataset>`` (checked by torchvision's MD5 sums); with a
    card, class folders of image files (:func:`zoo.image_folder.read_folder`) in ``DIR/<dataset>/<split>`` or ``DIR/<split>``, where
    the test split may be called ``val`` too, ``DIR/<dataset>/val*``, or ``DIR`` itself.

    Args:
        card: of the network that will see the images: number of classes, size and crop. Needed for other data sets than CIFAR.
        download: fetch CIFAR with torchvision if it is not there; nothing is left behind where that fails.

    Raises:
        FileNotFoundError: listing what was looked for. ValueError: for an unknown data set, no folder where one is needed, or
            labels out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if dataset == "digits":
        return load_digits(split)
    if card is None and dataset not in _TORCHVISION:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join((*_TORCHVISION, *BUNDLED))}")
    if data_dir is None:
        raise ValueError(f"no data folder: {dataset} does not come with a package; give --data DIR or set GRANQ_DATA")
    root, classes = Path(data_dir), DATASETS[dataset][0] if card is None else card.num_classes
    npz = [root / dataset / f"{split}.npz", root / f"{split}.npz"]
    found = next((p for p in npz if p.is_file()), None)
    if found is not None:
        return replace(_with_labels_below(classes, read_npz(found)), description=f"{dataset} {split} images")
    looked_for = list(npz)
    if dataset in _TORCHVISION:
        class_name, folder = _TORCHVISION[dataset]
        folders = [root / folder, root / dataset / folder]
        looked_for += folders
        found = next((p for p in folders if p.is_dir()), None)
        if found is None and download:
            found = _download(class_name, root, folder)
        if found is not None:
            data = _with_labels_below(classes, _read_torchvision(class_name, found, split))
            return replace(data, description=f"{dataset} {split} images")
    elif download:
        raise ValueError(f"{dataset} cannot be downloaded, only {', '.join(_TORCHVISION)} can")
    if card is not None:
        names = [split, "val"] if split == "test" else [split]
        candidates = [root / dataset / n for n in names] + [root / n for n in names]
        looked_for += [f"{p}/CLASS/*" for p in candidates] + ([f"{root / dataset}/val*/CLASS/*"] if split == "test" else [])
        if split == "test" and (root / dataset).is_dir():
            candidates += sorted(p for p in (root / dataset).glob("val*") if p not in candidates)
        candidates.append(root)
        looked_for.append(f"{root}/CLASS/*")
        found = next((p for p in candidates if p.is_dir() and class_folders(p)), None)
        if found is not None:
            return read_folder(found, card.preprocessing, classes)
    hint = "; granq zoo evaluate NAME --download fetches it" if dataset in _TORCHVISION else ""
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {str(root)!r}{hint}")
    raise FileNotFoundError(
        f"no {dataset} {split} images under {str(root)!r}; looked for: {', '.join(map(str, looked_for))}{hint}")


def in_memory(data: "ImageSet | FolderImages") -> ImageSet:
    """The same images, decoded, resized and cropped: for training, which draws them at random, again and again.

    Raises:
        ValueError: if they would take more than half of the machine's memory, or one of them cannot be read.
    """
    if isinstance(data, ImageSet):
        return data
    needed = len(data) * data.preprocessing.channels * data.preprocessing.image_size**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * needed > memory:
        raise ValueError(f"{len(data)} images of {data.source!r} take {needed / 2**30:.1f} GiB in memory, where training draws "
                         f"them from; at most half of this machine's {memory / 2**30:.1f} GiB is allowed")
    return ImageSet(data.images, data.labels, data.source, data.description)


def _with_labels_below(classes: int, data: ImageSet) -> ImageSet:
    if len(data) and not 0 <= int(data.labels.min()) <= int(data.labels.max()) < classes:
        raise ValueError(f"labels in {data.source!r} run from {int(data.labels.min())} to {int(data.labels.max())}; "
                         f"allowed: 0 to {classes - 1}")
    return data


def _read_torchvision(class_name: str, folder: Path, split: str) -> ImageSet:
    import torchvision.datasets
    try:
        stored = getattr(torchvision.datasets, class_name)(folder.parent, train=split == "train")
    except RuntimeError as e:
        raise ValueError(f"{str(folder)!r} is incomplete or damaged: {e}") from e
    return _image_set(stored.data, np.asarray(stored.targets), folder)


def _download(class_name: str, root: Path, folder: str) -> Path:
    """Fetch into a temporary folder beside the final one, which takes its name when it is whole."""
    import torchvision.datasets
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as part:
        try:
            getattr(torchvision.datasets, class_name)(part, download=True)
        except (RuntimeError, OSError) as e:
            raise OSError(f"{class_name} could not be downloaded to {str(root)!r}: {e}") from e
        os.replace(Path(part, folder), root / folder)
    return root / folder
