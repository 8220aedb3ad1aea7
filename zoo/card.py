"""The card of a zoo entry: what it is, how well it does, and where it comes from. TOML, read and written whole."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, get_args, get_origin, get_type_hints

from granq_plugin.reading import parse_toml, toml_value
from zoo.quantization import Quantization

if TYPE_CHECKING:  # the command line reads this file without torch
    from torch import Tensor, nn

__all__ = ["DATASETS", "Card", "Costs", "Preprocessing", "Results", "Teacher", "Training", "Weights"]

MOST_SIZE, MOST_CHANNELS, MOST_CLASSES = 2**12, 2**8, 2**17
"""A card's sizes are bounded before anything is allocated."""


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs: ``(x / 255 - mean) / std`` per channel, at ``image_size`` x ``image_size`` pixels.

    Attributes:
        mean, std: a number per channel. resize: image files are first resized to this shorter side (torchvision's Resize), then
            cropped in the centre; None: only cropped. interpolation: "bilinear" or "bicubic".
    """
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= (MOST_SIZE if self.resize is None else self.resize) <= MOST_SIZE:
            raise ValueError(f"image_size must be 1 to {MOST_SIZE} and at most resize, got {self.image_size} and {self.resize}")
        if len(self.mean) > MOST_CHANNELS:
            raise ValueError(f"mean and std have at most {MOST_CHANNELS} channels, got {len(self.mean)}")
        if not len(self.mean) == len(self.std) > 0 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be equally long lists, std above 0, got {self.mean} and {self.std}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be bilinear or bicubic, got {self.interpolation!r}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 inputs ``[B, C, S, S]`` of uint8 images of the same shape.

        Raises:
            TypeError: for anything but bytes. ValueError: for images of another size or number of channels than the network's.
        """
        import torch
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            raise TypeError(f"images must be a uint8 tensor, got {getattr(images, 'dtype', '')} {type(images).__name__}; "
                            "what is normalized already goes into the network as it is")
        c, size = self.channels, self.image_size
        if images.dim() != 4 or images.shape[2:] != (size, size):
            found = "x".join(map(str, images.shape[2:]))
            raise ValueError(f"images are {found}, the network takes {size}x{size}")
        if images.shape[1] != c:
            raise ValueError(f"images have {images.shape[1]} channels, the network takes {c}")
        mean, std = (_per_channel(v, images.device) for v in (self.mean, self.std))
        return (images / 255 - mean) / std


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: object) -> Tensor:
    """``[1, C, 1, 1]``; kept, since a GPU waits for every copy to it."""
    import torch
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


DATASETS = {
    "cifar10": (10, Preprocessing(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": (100, Preprocessing(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "digits": (10, Preprocessing(8, (0.3054, ), (0.3753, ))),
    "imagenet": (1000, Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=256)),
}
"""Classes and usual preprocessing, for networks without a card. Channel statistics of the training images; torchvision's."""


@dataclass(frozen=True)
class Teacher:
    """The float network that a quantized one comes from, or where the weights of a float one come from.

    Attributes:
        source: an address, or the name of a zoo entry. license: of its weights. sha256: of the file of weights.
    """
    source: str
    license: str
    sha256: str | None = None


@dataclass(frozen=True)
class Weights:
    """The file ``pretrained/NAME.safetensors``. Attributes: sha256, bytes: of that file. license: its terms."""
    sha256: str
    bytes: int
    license: str


@dataclass(frozen=True)
class Results:
    """Counts over a test set, at the last epoch.

    Attributes:
        data: what was evaluated on, in words. images: how many. correct, correct5: how many of them at first place, and among the
            first five. top1, top5: the same in percent, to two decimals. float_top1: of the teacher, on the same images.
    """
    data: str
    images: int
    correct: int
    correct5: int
    top1: float
    top5: float
    float_top1: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.correct5 <= self.images or not self.images:
            raise ValueError(
                f"counts must be 0 <= correct <= correct5 <= images, got {self.correct}, {self.correct5}, {self.images}")
        for name, count in (("top1", self.correct), ("top5", self.correct5)):
            if abs(getattr(self, name) - 100 * count / self.images) > 0.00501:
                raise ValueError(f"{name} = {getattr(self, name)} is not {count} of {self.images}")


@dataclass(frozen=True)
class Costs:
    """Per image. parameters: of the network. weight_bytes: of its convolutions and linear layers at their bit widths."""
    parameters: int
    macs: int
    bit_operations: int
    weight_bytes: int


@dataclass(frozen=True)
class Training:
    """How the weights were made, by the card's command.

    Attributes:
        epochs: the last one, which is the one that is shipped. version: of the plugin. log: metrics, epoch by epoch, and config:
            settings; files in the zoo's folder.
    """
    epochs: int
    version: str
    log: str
    config: str | None = None


@dataclass(frozen=True)
class Card:
    """One zoo entry. It names code: :meth:`build` imports and calls it, so a stranger's card is a stranger's program.

    Attributes:
        name: the card's file name. architecture: ``module:function``, called with ``num_classes`` and ``architecture_args``.
        dataset: the data set's name, which is also its folder's. license: of the weights. date: of the card's numbers.
        preset: of ``granq qat``. command: the one that made the entry, paths replaced by words.
        quantization: None for a float network. Others: see their types; None where there is none (weights: not shipped; results:
            never evaluated; training: none, or elsewhere).
    """
    name: str
    architecture: str
    dataset: str
    num_classes: int
    preprocessing: Preprocessing
    description: str = ""
    license: str = ""
    date: str | None = None
    preset: str | None = None
    command: str | None = None
    architecture_args: dict = field(default_factory=dict)
    quantization: Quantization | None = None
    teacher: Teacher | None = None
    weights: Weights | None = None
    results: Results | None = None
    costs: Costs | None = None
    training: Training | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.architecture):
            raise ValueError(f"architecture must be module:function, got {self.architecture!r}")
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(f"num_classes must be 1 to {MOST_CLASSES}, got {self.num_classes}")
        for part in (self.teacher, self.weights):
            digest = getattr(part, "sha256", None)
            if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"sha256 must be 64 hexadecimal digits, got {digest!r}")
        if self.date is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", self.date):
            raise ValueError(f"date must be YYYY-MM-DD, got {self.date!r}")

    @classmethod
    def from_toml(cls, name: str, text: str) -> Card:
        """Parse a card. Raises a ValueError that names the card and what is wrong with it."""
        try:
            entries = parse_toml(text)
            if "name" in entries:
                raise ValueError("unknown entry name: the file's name is the entry's")
            return _parsed(cls, entries | {"name": name}, "")
        except (ValueError, TypeError) as e:
            raise ValueError(f"zoo card {name!r} is malformed: {e}") from e

    def to_toml(self) -> str:
        """The card as text, which :meth:`from_toml` reads back."""
        lines, tables = [], []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "name" or value is None or value in ("", {}):
                continue
            if dataclasses.is_dataclass(value):
                value = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
            if isinstance(value, dict):
                tables += ["", f"[{f.name}]", *(f"{k} = {toml_value(v)}" for k, v in value.items())]
            else:
                lines.append(f"{f.name} = {toml_value(value)}")
        return "\n".join(lines + tables) + "\n"

    def build(self) -> nn.Module:
        """The float network, with fresh weights, in evaluation mode.

        Raises:
            ValueError: if the architecture cannot be imported or called, or is no eager torch module.
        """
        import torch
        module, function = self.architecture.split(":")
        if module.split(".")[0] in {*sys.stdlib_module_names, "torch"}:  # not even imported: networks are elsewhere
            raise ValueError(f"card {self.name!r}: there is no network in {module!r}")
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as e:
            raise ValueError(f"card {self.name!r}: there is no {self.architecture!r}: {e} (the command line looks in the working "
                             "folder, too)") from e
        try:
            network = found(num_classes=self.num_classes, **self.architecture_args)
        except TypeError as e:
            raise ValueError(f"card {self.name!r}: {self.architecture!r} does not take these arguments: {e}") from e
        if not isinstance(network, torch.nn.Module) or isinstance(network, torch.jit.ScriptModule):
            raise ValueError(f"card {self.name!r}: {self.architecture!r} must return a torch.nn.Module, and no TorchScript; "
                             f"got {type(network).__name__}")
        return network.eval()

    def example_input(self) -> Tensor:
        """A black image, ``[1, C, S, S]``."""
        import torch
        size = self.preprocessing.image_size
        return torch.zeros(1, self.preprocessing.channels, size, size)


def _parsed(kind: type, entries: dict, where: str):
    """A dataclass of plain values, checked against its annotations; errors name the entry."""
    fields, types = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind)
    unknown = [k for k in entries if k not in fields]
    if unknown:
        raise ValueError(f"unknown entry {where}{unknown[0]}; allowed: {', '.join(k for k in fields if k != 'name')}")
    missing = [k for k, f in fields.items()
               if k not in entries and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise ValueError(f"there is no entry {where}{missing[0]}")
    values = {k: _value(types[k], v, where + k) for k, v in entries.items()}
    try:
        return kind(**values)
    except ValueError as e:
        raise ValueError(f"[{where.rstrip('.')}] {e}" if where else str(e)) from e


def _value(kind, value, where: str):
    if isinstance(kind, UnionType):  # X | None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"entry {where} must be a table, got {value!r}")
        return _parsed(kind, value, f"{where}.")
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"entry {where} must be a list of numbers, got {value!r}")
        return tuple(_value(get_args(kind)[0], v, where) for v in value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", dict: "a table"}
        raise ValueError(f"entry {where} must be {words[kind]}, got {value!r}")
    return value
