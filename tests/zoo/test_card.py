"""Cards: read, written, checked; those that are shipped are true of the files beside them."""

import csv
import hashlib
import sys
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import zoo
from zoo.card import Card, Costs, Preprocessing, Results, Teacher, Training, Weights
from zoo.quantization import Quantization
from zoo.registry import read_weights

GOOD = """
architecture = "zoo.models.cifar_resnet:resnet20"
dataset = "cifar10"
num_classes = 10
[preprocessing]
image_size = 32
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
"""
RESULTS = "[results]\ndata = 'x'\nimages = 10\ncorrect = 5\ncorrect5 = 9\ntop1 = 50.0\ntop5 = 90.0\n"
NAMES = zoo.list_models()


def test_a_card_survives_the_way_through_its_file():
    card = Card(
        "all", "a.b:c", "cifar10", 10, Preprocessing(8, (0.5, ), (0.25, ), 10, "bicubic"), 'words with "quotes" and ü', "MIT",
        "2026-01-31", "cifar10_fast", "granq qat ...", dict(depth=8, shortcut="B", flag=True),
        Quantization(3, 4, "per-output-channel-symmetric", "static", True), Teacher("here", "MIT", "a" * 64),
        Weights("b" * 64, 12, "MIT"), Results("x", 3, 1, 2, 33.33, 66.67, 50.0), Costs(1, 2, 3, 4),
        Training(24, "0.1.0", "logs/all.csv", "configs/all.toml"))
    assert Card.from_toml("all", card.to_toml()) == card
    bare = Card.from_toml("bare", GOOD)
    assert Card.from_toml("bare", bare.to_toml()) == bare


@pytest.mark.parametrize("text, message", [
    (GOOD.replace('dataset = "cifar10"', ""), "there is no entry dataset"),
    (GOOD.replace("image_size = 32\n", ""), "there is no entry preprocessing.image_size"),
    (GOOD + "size = 3", "unknown entry preprocessing.size; allowed: image_size, "),
    ("colour = 1\n" + GOOD, "unknown entry colour; allowed: architecture"),
    ("name = 'x'\n" + GOOD, "unknown entry name"),
    (GOOD.replace("[preprocessing]", "[preprocessing"), "Expected"),
    (GOOD.replace("num_classes = 10", "num_classes = 10.5"), "num_classes must be a whole number, got 10.5"),
    (GOOD.replace("num_classes = 10", "num_classes = true"), "num_classes must be a whole number, got True"),
    (GOOD.replace("num_classes = 10", "num_classes = 0"), "num_classes must be 1 to 131072, got 0"),
    (GOOD.replace(":resnet20", ""), "architecture must be module:function"),
    (GOOD.replace("mean = [0.5, 0.5, 0.5]", "mean = [0.5, nan, 0.5]"), "preprocessing.mean must be a finite number, got nan"),
    (GOOD.replace("mean = [0.5, 0.5, 0.5]", "mean = 0.5"), "preprocessing.mean must be a list of numbers"),
    (GOOD.replace("mean = [0.5, 0.5, 0.5]", "mean = [0.5]"), r"\[preprocessing\] mean and std must be equally long"),
    (GOOD + "resize = 20", r"\[preprocessing\] image_size must be .* at most resize, got 32 and 20"),
    (GOOD + "interpolation = 'nearest'", "bilinear or bicubic, got 'nearest'"),
    (GOOD + "[quantization]\nweight_bit_width = 17\nact_bit_width = 4", r"\[quantization\] weight_bit_width must be .* got 17"),
    (GOOD + "[quantization]\nweight_bit_width = 4\nact_bit_width = 4\nactivations = 'odd'", "activations must be one of dynamic"),
    (GOOD + "[weights]\nsha256 = 'abc'\nbytes = 3\nlicense = 'MIT'", "sha256 must be 64 hexadecimal digits, got 'abc'"),
    (GOOD + RESULTS.replace("50.0", "51.0"), r"\[results\] top1 = 51.0 is not 5 of 10"),
    (GOOD + RESULTS.replace("correct5 = 9", "correct5 = 4"), r"\[results\] counts must be"),
    (GOOD + "[teacher]\nsource = 3\nlicense = 'MIT'", "entry teacher.source must be text, got 3"),
    ("teacher = 3\n" + GOOD, "entry teacher must be a table, got 3"),
    ("date = 'today'\n" + GOOD, "date must be YYYY-MM-DD"),
])
def test_malformed_cards_are_named(text, message):
    with pytest.raises(ValueError, match=f"zoo card 'bad' is malformed: .*{message}"):
        Card.from_toml("bad", text)


def test_networks_that_cannot_be_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(network=dict))
    for architecture, message in (("zoo.models.nothing:x", "there is no 'zoo.models.nothing:x'"), ("mine:network", "got dict"),
                                  ("zoo.models.cifar_resnet:resnet21", "there is no .*resnet21"),
                                  ("zoo.models.cifar_resnet:copy", "not callable"), ("os:abort", "no network in 'os'"),
                                  ("torch.hub:load", "no network in 'torch.hub'"), ("antigravity:x", "no network in")):
        with pytest.raises(ValueError, match=f"card 'x': .*{message}"):
            Card.from_toml("x", GOOD.replace("zoo.models.cifar_resnet:resnet20", architecture)).build()


def test_preprocessing_of_any_channels():
    grey = Preprocessing(2, (0.5, ), (0.25, ))
    x = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    assert torch.allclose(grey(x), torch.tensor([[[[-2.0, 2.0], [-1.2, -0.4]]]]))
    with pytest.raises(ValueError, match="images have 3 channels, the network takes 1"):
        grey(x.expand(1, 3, 2, 2))
    with pytest.raises(ValueError, match="images are 4x6, the network takes 2x2"):
        grey(torch.zeros(1, 1, 4, 6, dtype=torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_cards_are_true_of_their_files(name):
    card, files = zoo.get_card(name), resources.files("zoo")
    assert card.name == name and card.license + (card.teacher.license if card.teacher else "")
    assert Card.from_toml(name, card.to_toml()) == card
    if card.quantization is not None:
        assert name.split(".")[1] == card.quantization.suffix and name.split(".")[0] in NAMES
        base = zoo.get_card(name.split(".")[0])
        assert (base.architecture, base.architecture_args, base.preprocessing) == (
            card.architecture, card.architecture_args, card.preprocessing)
    if card.weights is not None:
        data = read_weights(card)
        assert hashlib.sha256(data).hexdigest() == card.weights.sha256 and len(data) == card.weights.bytes
        assert card.results is not None and card.training is not None and card.command and card.date
    if card.training is not None:
        rows = list(csv.DictReader(files.joinpath(card.training.log).read_text(encoding="utf-8").splitlines()))
        assert int(rows[-1]["epoch"]) == card.training.epochs
        if rows[-1].get("accuracy"):  # of the run; what is shipped is that network
            assert float(rows[-1]["accuracy"]) == pytest.approx(card.results.top1, abs=0.006)
        if card.training.config is not None:
            assert "epochs" in files.joinpath(card.training.config).read_text(encoding="utf-8")


def test_no_file_belongs_to_no_card():
    for folder, suffix in (("pretrained", ".safetensors"), ("logs", ".csv"), ("configs", ".toml")):
        place = resources.files("zoo").joinpath(folder)
        found = [f.name.removesuffix(suffix) for f in place.iterdir() if f.name.endswith(suffix)] if place.is_dir() else []
        assert set(found) <= set(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if zoo.get_card(n).weights is not None])
def test_shipped_weights_run(name):
    model = zoo.get_model(name, pretrained=True)
    with torch.no_grad():
        logits = model(model.card.example_input())
    assert logits.shape == (1, model.card.num_classes) and torch.isfinite(logits).all()


@pytest.mark.parametrize("images", [torch.rand(1, 3, 32, 32), np.zeros((1, 3, 32, 32), np.uint8)])
def test_preprocessing_takes_bytes_alone(images):
    with pytest.raises(TypeError, match="images must be a uint8 tensor, got (torch.float32 Tensor|uint8 ndarray)"):
        zoo.get_card("resnet20_cifar10").preprocessing(images)
