"""Image files in class folders: labels, sizes, and the transforms of torchvision's weights."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from granq_plugin import cli
from zoo.card import Card, Preprocessing
from zoo.data import in_memory, load_images
from zoo.image_folder import read_folder

Image = pytest.importorskip("PIL.Image", reason="Pillow (with torchvision, zoo extra) is not installed")
pytest.importorskip("torchvision", reason="torchvision (zoo extra) is not installed")
PREPROCESSING = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize=10)
CARD = Card("c", "a:b", "flowers", 3, PREPROCESSING)


def fill(folder, names, per_class=2, size=(12, 9), suffix=".png", seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name / f"{i}{suffix}")
    return folder


def test_names_that_are_numbers_are_class_ids(tmp_path):
    data = read_folder(fill(tmp_path, ["2", "0", "10"]), PREPROCESSING, 11)
    assert data.labels.tolist() == [0, 0, 2, 2, 10, 10] and [f.parent.name for f in data.files[::2]] == ["0", "2", "10"]
    with pytest.raises(ValueError, match="class folder '10' .* out of range: classes are 0 to 9"):
        read_folder(tmp_path, PREPROCESSING, 10)


def test_other_names_are_classes_in_sorted_order(tmp_path):
    data = read_folder(fill(tmp_path, ["n02", "n01", "n10"]), PREPROCESSING, 3)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.files[2].parent.name == "n02"
    with pytest.raises(ValueError, match="has 3 class folders, the network has 4 classes"):
        read_folder(tmp_path, PREPROCESSING, 4)


def test_pixels_are_those_of_torchvision_s_transforms(tmp_path):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
    fill(tmp_path, ["0", "1"], size=(23, 31))
    for interpolation in ("bilinear", "bicubic"):
        preprocessing = dataclasses.replace(PREPROCESSING, interpolation=interpolation)
        data = read_folder(tmp_path, preprocessing, 2)
        transforms = Compose([Resize(10, InterpolationMode(interpolation)), CenterCrop(8), PILToTensor()])
        expected = torch.stack([transforms(Image.open(f).convert("RGB")) for f in data.files])
        assert torch.equal(data.images, expected)
        assert preprocessing(data.images).shape == (4, 3, 8, 8)


def test_squares_that_were_resized_before_are_cropped(tmp_path):
    data = read_folder(fill(tmp_path / "val", ["0"], size=(9, 9)), PREPROCESSING, 1)
    assert torch.equal(data.images[0], torch.from_numpy(np.array(Image.open(data.files[0])))[:8, :8].permute(2, 0, 1))
    assert data.description.endswith("val, centre crop of 9x9")


def test_batches_are_shared_without_loss(tmp_path):
    data = read_folder(fill(tmp_path, ["0", "1", "2"], per_class=3), PREPROCESSING, 3)
    whole = list(data.batches(2))
    assert [len(y) for _, y in whole] == [2, 2, 2, 2, 1] and torch.equal(torch.cat([x for x, _ in whole]), data.images)
    ranks = [list(data.batches(2, rank, 2)) for rank in range(2)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ranks[0] + ranks[1], whole[::2] + whole[1::2]))
    assert list(data.batches(2, 7, 8)) == []
    subset = data.subset(4)
    assert len(subset) == 4 and subset.files == data.subset(4).files and len(set(subset.files)) == 4


@pytest.mark.parametrize("place", ["flowers/test", "flowers/val", "test", "val", "flowers/val500", "."])
def test_places_that_are_looked_into(tmp_path, place):
    fill(tmp_path / place, ["a", "b", "c"])
    assert load_images(tmp_path, "flowers", card=CARD).source == str(tmp_path / place)


def test_nothing_found_lists_the_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no flowers test images .* looked for: .*flowers/test.npz, .*"
                                                r"/flowers/test/CLASS/\*, .*/val/CLASS/\*, .*/flowers/val\*/CLASS/\*"):
        load_images(tmp_path, "flowers", card=CARD)
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        read_folder(tmp_path, PREPROCESSING, 3)
    with pytest.raises(ValueError, match="flowers cannot be downloaded"):
        load_images(tmp_path, "flowers", card=CARD, download=True)


def test_bad_images_are_named(tmp_path):
    fill(tmp_path, ["0"], size=(5, 40))
    with pytest.raises(ValueError, match=r"0.png' is 5x40, the network takes 8x8"):
        read_folder(tmp_path, dataclasses.replace(PREPROCESSING, resize=None), 1).images  # noqa: B018
    (tmp_path / "0" / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"0.png' is not a readable image"):
        read_folder(tmp_path, PREPROCESSING, 1).images  # noqa: B018


def test_decoded_for_training_they_are_the_same(tmp_path, monkeypatch):
    fill(tmp_path, ["a", "b", "c"])
    data = read_folder(tmp_path, PREPROCESSING, 3)
    decoded = in_memory(data)
    assert torch.equal(decoded.images, torch.cat([x for x, _ in data.batches(2)])) and torch.equal(decoded.labels, data.labels)
    assert in_memory(decoded) is decoded
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(ValueError, match="6 images of .* take 0.0 GiB in memory"):
        in_memory(data)


def test_a_teacher_is_trained_from_image_folders(tmp_path, capsys):
    """Of a card file's network; the accuracy is never that of the training images."""
    (tmp_path / "small.toml").write_text(dataclasses.replace(
        CARD, architecture="zoo.models.cifar_resnet:resnet8", license="MIT").to_toml())
    fill(tmp_path / "data", ["a", "b", "c"], per_class=6)
    command = ["train-teacher", str(tmp_path / "small.toml"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"),
               "--set", "epochs=2", "--set", "batch_size=4"]
    assert cli.run(command) != 0
    assert "has no test images beside those to train on: give --holdout N" in capsys.readouterr().err
    assert cli.run([*command, "--holdout", "4"]) == 0
    assert "on 4 held-out training images" in capsys.readouterr().out
    fill(tmp_path / "data" / "flowers" / "train", ["a", "b", "c"], per_class=6)
    fill(tmp_path / "data" / "flowers" / "test", ["a", "b", "c"], per_class=3)
    command[command.index("--out") + 1] = str(tmp_path / "run2")
    assert cli.run(command) == 0, capsys.readouterr().err
    assert "on 9 test images" in capsys.readouterr().out


@pytest.mark.parametrize("command", [
    ("train-teacher", "--set=epochs=2", "--set=batch_size=4"),
    ("qat", "--weights=w.pt", "--preset=cifar10_fast", "--set=image_size=8")])
@pytest.mark.parametrize("test, message", [("too small", "0.png' is 5x5, the network takes 8x8"),
                                           ("none", "no images in"), ("other size", "images are 9x9, the network takes 8x8")])
def test_test_images_that_do_not_fit_are_found_before_training(tmp_path, capsys, monkeypatch, command, test, message):
    """Not in the evaluation at its end."""
    monkeypatch.chdir(tmp_path)
    card = dataclasses.replace(CARD, architecture="zoo.models.cifar_resnet:resnet8", num_classes=10,
                               preprocessing=dataclasses.replace(PREPROCESSING, resize=None))
    Path("small.toml").write_text(card.to_toml())
    torch.save(card.build().state_dict(), "w.pt")
    fill(tmp_path / "data/flowers/train", ["0", "1", "2"], per_class=6, size=(8, 8))
    if test == "too small":
        fill(tmp_path / "data/flowers/test", ["0", "1", "2"], size=(5, 5))
    else:
        count = 0 if test == "none" else 3
        np.savez("data/flowers/test.npz", x=np.zeros((count, 9, 9, 3), np.uint8), y=np.arange(count))
    verb, *options = command
    assert cli.run([verb, "small.toml", "--data", "data", "--out", "run", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("run").exists()


@pytest.mark.parametrize("size", [(20_000, 4_000), (1, 60_000), (60_000, 1)])
def test_images_that_would_fill_the_memory(tmp_path, size):
    """A narrow one grows when its shorter side is resized."""
    (tmp_path / "0").mkdir()
    Image.new("1", size).save(tmp_path / "0" / "a.png")
    images = read_folder(tmp_path, dataclasses.replace(PREPROCESSING, resize=256, image_size=224), 10)
    with pytest.raises(ValueError, match=r"a.png' is not a readable image: it has \d+x\d+ pixels, more than"):
        next(images.batches(1))


def test_pipes_and_folders_are_no_images(tmp_path):
    """Opening a pipe would wait for ever."""
    (tmp_path / "0" / "folder.png").mkdir(parents=True)
    os.mkfifo(tmp_path / "0" / "pipe.png")
    with pytest.raises(FileNotFoundError, match="no class folders"):
        read_folder(tmp_path, PREPROCESSING, 10)
