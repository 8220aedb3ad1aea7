"""Typed settings: frozen dataclasses whose fields know what is allowed, in and out of TOML."""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import TypeVar, get_args, get_origin

from granq_plugin.reading import parse_toml, read_text, toml_value

__all__ = ["Settings", "setting"]

S = TypeVar("S", bound="Settings")


def setting(default, meaning: str, least=None, most=None, above=None, choices: tuple = ()):
    """A field with what is allowed: ``least <= value <= most``, ``value > above``, or one of ``choices``."""
    return dataclasses.field(
        default=default, metadata=dict(meaning=meaning, least=least, most=most, above=above, choices=choices))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses whose fields are made by :func:`setting`; whole numbers, numbers, booleans, strings, and tuples.

    Raises:
        TypeError, ValueError: at construction, naming the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))

    def replace(self: S, **settings) -> S:
        """A copy with other settings. Raises a ValueError for an unknown one, with the nearest known one."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
                raise ValueError(f"unknown setting {name!r}; " + (f"did you mean: {', '.join(near)}" if near else
                                                                  f"allowed: {', '.join(known)}"))
        return dataclasses.replace(self, **settings)

    def to_toml(self) -> str:
        """All settings as TOML, one line each with its meaning; :meth:`from_toml` reads them back."""
        lines = [f"{f.name} = {toml_value(getattr(self, f.name))}  # {f.metadata['meaning']}" for f in dataclasses.fields(self)]
        return "\n".join(lines) + "\n"

    def differences(self: S, base: S) -> str:
        """The settings that are not ``base``'s, as ``name = value`` in TOML, separated by commas."""
        names = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(base, f.name))
        return ", ".join(f"{name} = {toml_value(getattr(self, name))}" for name in names)

    @classmethod
    def from_toml(cls: type[S], text: str, base: S | None = None) -> S:
        """Settings from TOML; those that it leaves out are ``base``'s, or the defaults.

        Raises:
            ValueError: for text that is not TOML, and for an unknown setting, with the nearest known one.
        """
        return (base or cls()).replace(**parse_toml(text))

    @classmethod
    def from_file(cls: type[S], path: str | Path, base: S | None = None) -> S:
        """As :meth:`from_toml`, of a file; errors name it. Raises a FileNotFoundError, too."""
        text = read_text(path)
        try:
            return cls.from_toml(text, base)
        except (ValueError, TypeError) as e:
            raise type(e)(f"{str(path)!r}: {e}") from e


def _checked(field: dataclasses.Field, value):
    """``value`` in the field's type, or an error that names the field."""
    kind, allowed = field.type, field.metadata
    if get_origin(kind) is tuple:
        item, length = get_args(kind)[0], None if get_args(kind)[-1] is Ellipsis else len(get_args(kind))
        if not isinstance(value, (tuple, list)) or length not in (None, len(value)):
            raise TypeError(f"{field.name} must be a list of {length or 'any number of'} numbers, got {value!r}")
        return tuple(_checked_item(field.name, item, v, allowed) for v in value)
    return _checked_item(field.name, kind, value, allowed)


def _checked_item(name: str, kind: type, value, allowed):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "one of " + ", ".join(allowed["choices"])}
        raise TypeError(f"{name} must be {words[kind]}, got {value!r}")
    least, most, above, choices = (allowed[k] for k in ("least", "most", "above", "choices"))
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above}, got {value!r}")
    if most is None and kind is int:
        most = 2**63 - 1  # what torch takes
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    return value
