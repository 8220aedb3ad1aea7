"""Reading images: formats, and errors that say what was looked for."""

import hashlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import ImageSet, load_digits, load_images, read_npz


def arrays(n=6, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, classes, n)


def test_npz_is_found_in_both_places(tmp_path):
    x, y = arrays()
    (tmp_path / "cifar10").mkdir()
    for path in (tmp_path / "test.npz", tmp_path / "cifar10" / "test.npz"):
        np.savez(path, x=x, y=y)
        data = load_images(tmp_path, "cifar10")
        assert data.source == str(path)
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), x) and np.array_equal(data.labels.numpy(), y)


def test_torchvision_folder_gives_the_same_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision (zoo extra) is not installed")
    x, y = arrays()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    entry = pickle.dumps({"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "labels": y.tolist()})
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "test_batch").write_bytes(entry)
    (folder / "batches.meta").write_bytes(meta)
    digest = lambda b: hashlib.md5(b).hexdigest()  # noqa: E731
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", digest(entry)]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digest(meta)})
    data = load_images(tmp_path, "cifar10")
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), x) and np.array_equal(data.labels.numpy(), y)


def test_missing_data_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for: .*cifar10/test.npz, .*test.npz, .*cifar-10-batches-py"):
        load_images(tmp_path, "cifar10")
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        load_images(tmp_path / "nowhere", "cifar10")
    with pytest.raises(ValueError, match="unknown data set 'mnist'; known: cifar10, cifar100"):
        load_images(tmp_path, "mnist")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("x, y, message", [
    (arrays()[0].astype(np.float32), arrays()[1], r"must be uint8 \[N, H, W, 3\] or \[N, H, W, 1\], got float32"),
    (arrays()[0].transpose(0, 3, 1, 2), arrays()[1], r"got uint8 \[6, 3, 32, 32\]"),
    (arrays()[0], arrays()[1][:5], r"labels .* must be integers \[6\], got int64 \[5\]"),
    (arrays()[0], arrays()[1] / 2, "got float64"),
    (arrays()[0], arrays()[1] + 7, "labels .* run from .*; allowed: 0 to 9"),
])
def test_bad_arrays_are_described(tmp_path, x, y, message):
    np.savez(tmp_path / "test.npz", x=x, y=y)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, "cifar10")


def test_an_archive_that_unpacks_to_a_gigabyte_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "test.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(
            "x.npy", "w", force_zip64=True) as entry:
        for _ in range(20):
            entry.write(bytes(2**24))
    with pytest.raises(ValueError, match=r"test.npz' is not an .npz file .*: it unpacks to 335,544,320 bytes, more than images"):
        read_npz(tmp_path / "test.npz")


def test_damaged_or_pickled_files_are_refused(tmp_path):
    path = tmp_path / "test.npz"
    x, y = arrays()
    np.savez(path, x=x, y=y)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="not an .npz file with arrays x and y"):
        read_npz(path)
    np.savez(path, x=x, y=np.array([object()] * 6))
    with pytest.raises(ValueError, match="not an .npz file"):
        read_npz(path)
    np.savez(path, images=x)
    with pytest.raises(ValueError, match="not an .npz file"):
        read_npz(path)


def test_subset_is_drawn_by_seed_without_replacement():
    data = ImageSet(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 1, 1), torch.arange(50), "memory")
    subset = data.subset(20)
    assert torch.equal(subset.labels, data.subset(20).labels) and len(subset.labels.unique()) == 20
    assert torch.equal(subset.images[:, 0, 0, 0].long(), subset.labels)
    assert not torch.equal(subset.labels, data.subset(20, seed=1).labels)
    assert len(data.subset(99)) == 50


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision (zoo extra) is not installed")

    class Broken:
        def __init__(self, root, train=True, download=False):
            assert download
            (Path(root) / "cifar-10-batches-py").mkdir()
            (Path(root) / "cifar-10-python.tar.gz").write_bytes(b"half")
            raise error
    monkeypatch.setattr(datasets, "CIFAR10", Broken)
    for error, expected in ((OSError("connection reset"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)):  # noqa: B007
        with pytest.raises(expected):
            load_images(tmp_path, "cifar10", download=True)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="granq zoo evaluate NAME --download fetches it"):
        load_images(tmp_path, "cifar10")


def test_digits_are_split_once_and_for_all():
    """Both splits together are scikit-learn's images, each once; the same bytes everywhere; every class in its proportion."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn (zoo extra) is not installed")
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1438, 359) and train.images.shape[1:] == (1, 8, 8) and train.images.dtype == torch.uint8
    x, y = datasets.load_digits(return_X_y=True)
    everything = sorted([(int(label), *map(int, image)) for image, label in zip(x, y)])
    both = torch.cat([train.images, test.images]).flatten(1).double() * 16 / 255
    labels = torch.cat([train.labels, test.labels])
    assert sorted([(int(label), *map(int, image.round())) for image, label in zip(both, labels)]) == everything
    share = torch.bincount(test.labels) / torch.bincount(labels)
    assert (share - 0.2).abs().max() < 0.003
    digest = hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes()).hexdigest()
    assert digest == "1d5c348704d750e52b2449cd7b7a51bb3a64d8a3fe6e65a28604f3596bede0ab"


def test_digits_need_no_folder(tmp_path):
    assert len(load_images(None, "digits")) == len(load_images(tmp_path / "nowhere", "digits")) == 359
    with pytest.raises(ValueError, match="cifar10 does not come with a package; give --data DIR"):
        load_images(None, "cifar10")
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        load_digits("val")


BYTES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("images, labels, message", [
    (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), r"must be a uint8 tensor \[N, C, H, W\], got torch.float32"),
    (np.zeros((2, 3, 4, 4), np.uint8), torch.zeros(2, dtype=torch.int64), "got ndarray"),
    (BYTES, torch.zeros(2, 1, dtype=torch.int64), r"int64 tensor \[2\], got torch.int64 \[2, 1\]"),
    (BYTES, torch.zeros(3, dtype=torch.int64), r"of 2 images must be .* got torch.int64 \[3\]"),
    (BYTES, [0, 1], "got list")])
def test_what_is_no_image_set(images, labels, message):
    with pytest.raises(TypeError, match=message):
        ImageSet(images, labels, "memory")


def test_unknown_splits():
    for dataset in ("cifar10", "digits"):
        with pytest.raises(ValueError, match="split must be one of test, train, got 'val'"):
            load_images(None, dataset, "val")
