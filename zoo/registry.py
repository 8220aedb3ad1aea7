"""Zoo entries, found by name: their cards, and their networks with the weights that were published."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from granq_plugin.reading import existing_file, read_text
from zoo.card import DATASETS, Card

if TYPE_CHECKING:  # the command line reads this file without torch
    from torch import nn

    from zoo.packing import Packed

__all__ = ["Card", "card_of", "get_card", "get_model", "list_models", "read_weights", "teacher_of", "zoo_folder"]

def zoo_folder(zoo_dir: str | Path | None):
    """Where the cards, weights, logs and settings of a zoo are; None: the package's own."""
    return resources.files("zoo") if zoo_dir is None else Path(zoo_dir)


def list_models(pattern: str = "*", zoo_dir: str | Path | None = None) -> list[str]:
    """Names of the zoo's entries that match a shell pattern, sorted.

    Args:
        zoo_dir: another zoo's folder than the package's own.

    Example:
        >>> list_models("resnet8_digits*static")
        ['resnet8_digits.granq_w3a3_static']
    """
    cards = zoo_folder(zoo_dir).joinpath("cards")
    names = [f.name.removesuffix(".toml") for f in cards.iterdir() if f.name.endswith(".toml")] if cards.is_dir() else []
    return sorted(fnmatch.filter(names, pattern))


def get_card(name: str | Path, zoo_dir: str | Path | None = None) -> Card:
    """The card of an entry, or of a file ``PATH.toml`` of the user's own.

    Raises:
        ValueError: with the nearest names if there is no such entry; if the card is malformed. FileNotFoundError: for a file.

    Example:
        >>> card = get_card("resnet8_digits.granq_w3a3")
        >>> card.quantization.bits, card.results.images
        ('W3A3', 359)
    """
    name = os.fspath(name)
    if name.endswith(".toml"):
        path = existing_file(name, "card file")
        return Card.from_toml(path.stem, read_text(path))
    if ":" in name:
        raise ValueError(f"{name!r} is no zoo entry: module:function is for granq evaluate, qat and train-teacher")
    names = list_models("*", zoo_dir)
    if name not in names:
        near = difflib.get_close_matches(name, names, cutoff=0.3)
        words = f"did you mean: {', '.join(near)}" if near else f"granq zoo list (zoo.list_models()) shows all {len(names)}"
        raise ValueError(f"no zoo entry {name!r}; {words}; a network of your own is module:function or a card file PATH.toml")
    return Card.from_toml(name, zoo_folder(zoo_dir).joinpath("cards", f"{name}.toml").read_text(encoding="utf-8"))


def card_of(reference: str, dataset: str | None = None) -> Card:
    """The card of a float network: an entry's name, a card file ``PATH.toml``, or ``module:function`` of the user's own.

    A function is called with ``num_classes`` and returns a float ``nn.Module``; the rest is usual for ``dataset``, one of DATASETS.

    Raises:
        ValueError, FileNotFoundError: see :func:`get_card`; ValueError for a quantized entry, and for a function without a known
            data set, or a data set for anything else.
    """
    if ":" in reference and not reference.endswith(".toml"):
        if dataset not in DATASETS:
            got = "" if dataset is None else f", got {dataset!r}"
            raise ValueError(f"{reference!r} needs a data set (--dataset), one of {', '.join(DATASETS)}{got}; for others, or other "
                             "preprocessing, write a card file")
        if reference.split(":")[0].endswith(".py"):
            raise ValueError(f"{reference!r}: module:function has no '.py', as in {reference.replace('.py:', ':')!r}")
        num_classes, preprocessing = DATASETS[dataset]
        return Card(reference.split(":")[1], reference, dataset, num_classes, preprocessing)
    card = get_card(reference)
    if dataset not in (None, card.dataset):
        raise ValueError(f"{reference!r} is a network for {card.dataset}, got data set {dataset!r}")
    if card.quantization is not None:
        raise ValueError(f"{reference!r} is quantized already: start from a float network")
    return card


def teacher_of(card: Card, weights: str | Path | None = None) -> tuple[nn.Module, str]:
    """The float network of a card with the weights of a file, or those that the zoo ships, and the SHA-256 of the file.

    Raises:
        ValueError, FileNotFoundError: see :func:`read_weights` and :func:`zoo.weights.load_weights`.
    """
    if weights is None:
        return from_bytes(card, read_weights(card)), card.weights.sha256
    from zoo.weights import load_weights, sha256
    network = card.build()
    load_weights(network, weights)
    return network, sha256(weights)


def read_weights(card: Card, zoo_dir: str | Path | None = None) -> bytes:
    """The bytes of an entry's file of weights, checked against its card before anything is parsed.

    Raises:
        FileNotFoundError: if the entry ships no weights, or the file is absent. ValueError: if its SHA-256 is not the card's.
    """
    if card.weights is None:
        source = f"; they come from {card.teacher.source} ({card.teacher.license})" if card.teacher else ""
        raise FileNotFoundError(f"card {card.name!r} ships no weights{source}: give a file of float weights (--weights FILE)")
    file = zoo_folder(zoo_dir).joinpath("pretrained", f"{card.name}.safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"weights of zoo entry {card.name!r} are absent: there is no {str(file)!r}")
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.weights.sha256:
        raise ValueError(f"{str(file)!r} is damaged: its SHA-256 is {digest}, the card says {card.weights.sha256}; "
                         "nothing is loaded")
    return data


def get_model(
        name: str | Path, pretrained: bool = False, *, weights: str | Path | None = None,
        zoo_dir: str | Path | None = None) -> nn.Module:
    """A zoo network in evaluation mode; a Brevitas one for quantized entries. Its card is ``model.card``.

    Inputs are normalized images: ``model.card.preprocessing(uint8 images [B, C, S, S])``.

    Args:
        name: an entry (:func:`list_models`), or a card file ``PATH.toml``.
        pretrained: with the weights that the zoo ships, checked by SHA-256. Quantized weights are then frozen: integers times a
            scale (:func:`granq_plugin.freeze.freeze_weights`). False: fresh weights, and ranges still to be collected.
        weights: instead, a file of float weights of this architecture; a quantized entry quantizes them, without training.
        zoo_dir: another zoo's folder than the package's own.

    Raises:
        ValueError, FileNotFoundError: see :func:`get_card`, :func:`read_weights` and :func:`zoo.weights.load_weights`;
            ValueError also for a folded network without published ranges.

    Example:
        >>> import torch
        >>> model = get_model("resnet8_digits.granq_w3a3", pretrained=True)
        >>> images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
        >>> list(model(model.card.preprocessing(images)).shape)
        [2, 10]
    """
    card = get_card(name, zoo_dir)
    if pretrained and weights is not None:
        raise ValueError("pretrained=True takes the zoo's weights; give either it or weights=")
    if pretrained:
        model = from_bytes(card, read_weights(card, zoo_dir))
    else:
        model = quantized(card, card.build() if weights is None else teacher_of(card, weights)[0])
    model.card = card
    return model


def from_bytes(card: Card, data: bytes) -> nn.Module:
    """The network of a card with the weights of a file, in evaluation mode.

    Raises:
        ValueError: if the file is damaged or of another network.
    """
    from zoo.packing import read_packed
    packed = read_packed(data)
    model = card.build()
    if card.quantization is not None:
        model = quantized(card, model, lambda prepared: _with_ranges(card, prepared, packed))
    return packed.install(model)


def calibrated_from_bytes(card: Card, data: bytes) -> nn.Module:
    """Of a folded entry: the static network before folding, with the ranges of a file and fresh weights.

    Raises:
        ValueError: as :func:`from_bytes`.
    """
    from zoo.packing import read_packed
    return _with_ranges(card, card.quantization.prepared(card.build(), card.example_input()), read_packed(data))


def _with_ranges(card: Card, prepared: nn.Module, packed: Packed) -> nn.Module:
    state = prepared.state_dict()
    absent = [k for k in state if "scaling_impl" in k and k not in packed.calibrated]
    if absent:
        raise ValueError(f"weights of {card.name!r} are of another network: they hold no {absent[0]}")
    prepared.load_state_dict(state | packed.calibrated)
    return prepared.eval()


def quantized(card: Card, model: nn.Module, calibrate: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
    """A float network of the card, quantized as it says (not at all, if it says nothing)."""
    if card.quantization is None:
        return model
    return card.quantization.deployable(model, card.example_input(), calibrate).eval()
