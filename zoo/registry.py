"""Zoo entries are data: one TOML card each, found by name."""

import difflib
import fnmatch
import importlib
import sys
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import TYPE_CHECKING

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
if TYPE_CHECKING:  # the command line reads cards without torch
    from torch import nn

__all__ = ["Card", "get_card", "list_models"]


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs: ``(x / 255 - mean) / std`` per RGB channel, at ``image_size`` x ``image_size`` pixels."""
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Card:
    """One zoo entry.

    Attributes:
        name: the card's file name. architecture: ``module:function``, called with ``num_classes`` and ``architecture_args``.
        dataset: the data set's name, which is also its folder's. teacher: where float weights come from, and their licence.
    """
    name: str
    architecture: str
    dataset: str
    num_classes: int
    preprocessing: Preprocessing
    architecture_args: dict = field(default_factory=dict)
    teacher: dict = field(default_factory=dict)

    @classmethod
    def from_toml(cls, name: str, text: str) -> "Card":
        """Parse a card. Raises a ValueError that names the card and what is wrong with it."""
        try:
            entries = tomllib.loads(text)
            entries["preprocessing"] = Preprocessing(**entries["preprocessing"])
            return cls(name=name, **entries)
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as e:
            allowed = ", ".join(f.name for f in fields(cls) if f.name != "name")
            raise ValueError(f"zoo card {name!r} is malformed: {e}; its entries are: {allowed}") from e

    def build(self) -> "nn.Module":
        """The float network, with fresh weights, in evaluation mode."""
        module, function = self.architecture.split(":")
        return getattr(importlib.import_module(module), function)(num_classes=self.num_classes, **self.architecture_args).eval()


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo's entries that match a shell pattern, sorted."""
    files = (f.name for f in resources.files("zoo").joinpath("cards").iterdir())
    return sorted(fnmatch.filter((f.removesuffix(".toml") for f in files if f.endswith(".toml")), pattern))


def get_card(name: str) -> Card:
    """The card of one entry. Raises a ValueError with the nearest names if there is none."""
    names = list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, cutoff=0.3) or names
        raise ValueError(f"no zoo entry {name!r}; did you mean: {', '.join(near)}")
    return Card.from_toml(name, resources.files("zoo").joinpath("cards", f"{name}.toml").read_text(encoding="utf-8"))
