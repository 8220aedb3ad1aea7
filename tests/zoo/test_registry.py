"""Entries: found by name, with their weights or those of a file, and refused by name."""

import dataclasses
import hashlib
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import granq_plugin as gq
import zoo
from granq_plugin.cli import run as granq
from small_zoo import SMALL
from zoo.card import Weights
from zoo.packing import pack_tensors
from zoo.quantization import Quantization
from zoo.registry import card_of, from_bytes, teacher_of

NAME = "resnet20_cifar10"


@pytest.fixture
def folder(tmp_path):
    """A zoo of one float entry, ``own``."""
    torch.manual_seed(1)
    card = zoo.get_card(NAME)
    data = pack_tensors(card.build().state_dict())
    card = dataclasses.replace(card, name="own", teacher=None, weights=Weights(hashlib.sha256(data).hexdigest(), len(data), "MIT"))
    for name in ("cards", "pretrained"):
        (tmp_path / name).mkdir()
    (tmp_path / "cards" / "own.toml").write_text(card.to_toml())
    (tmp_path / "pretrained" / "own.safetensors").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("name", [n for n in zoo.list_models() if "." not in n])
def test_every_float_card_builds_a_network_with_its_number_of_classes(name):
    card = zoo.get_card(name)
    with torch.device("meta"):
        assert list(card.build().parameters())[-1].shape == (card.num_classes, )


def test_patterns_and_unknown_names(folder):
    assert zoo.list_models("resnet20*") == [n for n in zoo.list_models() if n.startswith("resnet20")] != []
    assert zoo.list_models("nothing*") == []
    assert zoo.list_models(zoo_dir=folder) == ["own"] and zoo.list_models(zoo_dir=folder / "none") == []
    with pytest.raises(ValueError, match="no zoo entry 'resnet2_cifar10'; did you mean: resnet20_cifar10"):
        zoo.get_card("resnet2_cifar10")
    with pytest.raises(ValueError, match=rf"no zoo entry '\?\?'; granq zoo list .* shows all {len(zoo.list_models())}; a net"):
        zoo.get_card("??")
    with pytest.raises(FileNotFoundError, match="card file 'no.toml' does not exist"):
        zoo.get_card("no.toml")


def test_pretrained_weights_are_loaded_and_checked(folder):
    torch.manual_seed(1)
    expected, x = zoo.get_card(NAME).build(), torch.randn(2, 3, 32, 32)
    model = zoo.get_model("own", pretrained=True, zoo_dir=folder)
    assert torch.equal(model(x), expected(x)) and not model.training and model.card.name == "own"
    file = folder / "pretrained" / "own.safetensors"
    data = bytearray(file.read_bytes())
    for position in (3, len(data) // 2, len(data) - 1):
        data[position] ^= 16
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"own.safetensors' is damaged: its SHA-256 .*, the card says .*; nothing is loaded"):
            zoo.get_model("own", pretrained=True, zoo_dir=folder)
        data[position] ^= 16
    file.unlink()
    with pytest.raises(FileNotFoundError, match="weights of zoo entry 'own' are absent: there is no .*own.safetensors"):
        zoo.get_model("own", pretrained=True, zoo_dir=folder)


def test_weights_that_are_not_shipped(tmp_path):
    with pytest.raises(FileNotFoundError, match="'resnet50_imagenet' ships no weights; they come from https://pytorch.org"):
        zoo.get_model("resnet50_imagenet", pretrained=True)
    with pytest.raises(ValueError, match="give either it or weights="):
        zoo.get_model(NAME, pretrained=True, weights="w.pt")


def test_float_weights_of_a_file_are_quantized_as_the_card_says(tmp_path):
    (tmp_path / "mine.toml").write_text(dataclasses.replace(SMALL, quantization=Quantization(4, 4)).to_toml())
    card = zoo.get_card(str(tmp_path / "mine.toml"))
    torch.manual_seed(0)
    network = card.build()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    model, x = zoo.get_model(str(tmp_path / "mine.toml"), weights=tmp_path / "w.pt"), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), gq.quantize(network, 4, 4)(x)) and model.card == card
    loaded, digest = teacher_of(card, tmp_path / "w.pt")
    assert digest == hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest() and torch.equal(loaded(x), network(x))


def test_tensorflow_pads_right_and_below():
    """As torchvision's, but for the place of the kernel: on an image shifted by a pixel the first convolution agrees."""
    from torchvision.models import mobilenet_v2
    torch.manual_seed(0)
    ours, theirs = zoo.get_card("mobilenet_v2_tf_imagenet").build(), mobilenet_v2().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 32, 32)
    shifted = nn.functional.pad(x, (1, 0, 1, 0))[..., :32, :32]  # torchvision's padding of 1 on the left, over again
    assert ours.features[0](x).shape == (1, 32, 16, 16)
    assert torch.allclose(ours.features[0](x)[..., :-1, :-1], theirs.features[0](shifted)[..., 1:, 1:], atol=1e-6)


def test_networks_of_the_user_s_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "nets_of_mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))\n"
        "def scripted(num_classes):\n    return torch.jit.script(small(num_classes))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    card = card_of("nets_of_mine:small", "cifar100")
    network = card.build()
    assert card.num_classes == 100 and network(card.example_input()).shape == (1, 100)
    with pytest.raises(ValueError, match=r"needs a data set \(--dataset\), one of cifar10, cifar100, digits, imagenet; for others"):
        card_of("nets_of_mine:small")
    with pytest.raises(ValueError, match="one of cifar10, cifar100, digits, imagenet, got 'svhn'"):
        card_of("nets_of_mine:small", "svhn")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="got RecursiveScriptModule"):
        warnings.simplefilter("ignore")  # newer versions of torch advise against torch.jit.script
        card_of("nets_of_mine:scripted", "cifar10").build()
    (tmp_path / "mine.toml").write_text(card.to_toml())
    assert card_of("mine.toml").architecture == "nets_of_mine:small"
    with pytest.raises(ValueError, match="is a network for cifar100, got data set 'cifar10'"):
        card_of("mine.toml", "cifar10")
    with pytest.raises(ValueError, match="is quantized already"):
        card_of("resnet18_imagenet.granq_w4a4")
    # the commands take them, too
    import numpy as np
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "test.npz", x=rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), y=rng.integers(0, 100, 20))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    for name in (["nets_of_mine:small", "--dataset", "cifar100"], ["mine.toml"]):
        assert granq(["evaluate", *name, "--weights", "w.pt", "--data", str(tmp_path)]) == 0
    assert "on cifar100 (20 test images)" in capsys.readouterr().out


def test_from_bytes_takes_the_structure_from_the_card():
    card = zoo.get_card(NAME)
    assert from_bytes(card, pack_tensors(card.build().state_dict())).linear.out_features == 10


def test_torch_hub_finds_every_entry():
    checkout = Path(__file__).parents[2]
    assert torch.hub.load(str(checkout), NAME, source="local").card == zoo.get_card(NAME)
    spec = importlib.util.spec_from_file_location("hubconf", checkout / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    for name in zoo.list_models():
        assert "zoo.get_model" in getattr(hubconf, name).__doc__
    assert hubconf.get_model is zoo.get_model and all(importlib.util.find_spec(package) for package in hubconf.dependencies)
