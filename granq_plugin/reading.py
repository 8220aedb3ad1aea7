"""Reading files that may be damaged or hostile: sizes are bounded before anything is allocated, and nothing in a file is run.

Every reader raises a FileNotFoundError for what is no file (devices and pipes included), and a ValueError that names the file and
what is wrong with it.
"""

import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["existing_file", "load_torch", "parse_toml", "read_json", "read_text", "reason_of", "toml_value"]

MOST_TEXT = 2**20
MOST_TOML = 2**16
MOST_LINE = 2**12
"""Of a TOML file: the parser's time and memory grow with the square of a dotted key's length."""
MOST_NESTED = 16


def existing_file(path: str | Path, what: str) -> Path:
    """``path``, if it is a regular file; ``what`` it should be is told otherwise. Raises a FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{what} {str(path)!r} {problem}")
    return path


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, of at most ``MOST_TEXT`` bytes."""
    path = existing_file(path, "file")
    with open(path, "rb") as f:
        data = f.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise ValueError(f"{str(path)!r} has more than {MOST_TEXT} bytes, too many for a file of this kind")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{str(path)!r} is not text in UTF-8: {e.reason} at byte {e.start}") from e


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file."""
    text = read_text(path)
    try:
        entries = json.loads(text)
        _check_nesting(entries)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{str(path)!r} is not a readable JSON file: {reason_of(e)}") from e
    if not isinstance(entries, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(entries).__name__}")
    return entries


def toml_value(value: Any) -> str:
    """TOML of a plain value: for these types, JSON is."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises a ValueError, which names no file."""
    if len(text) > MOST_TOML or max(map(len, text.splitlines()), default=0) > MOST_LINE:
        raise ValueError(f"a TOML text has at most {MOST_TOML} characters, {MOST_LINE} in a line")
    try:
        entries = tomllib.loads(text)
        _check_nesting(entries)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as e:
        raise ValueError(f"not a TOML file: {reason_of(e)}") from e
    return entries


def _check_nesting(value) -> None:
    """Later recursions, repr() among them, stay shallow."""
    level = [value]
    for _ in range(MOST_NESTED):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise ValueError(f"nested deeper than {MOST_NESTED}")


def load_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote: tensors and plain values only, on the CPU, checked against the archive's CRC-32 sums.

    Tensors are plain ones that own all of their elements, so that a copy is not larger than the file.
    """
    import torch
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                if any(i.compress_type != zipfile.ZIP_STORED for i in entries):
                    raise ValueError("its archive is compressed, which torch.save never does")
                if sum(i.file_size for i in entries) > path.stat().st_size:
                    raise ValueError("its archive declares more bytes than it has")
                damaged = archive.testzip()
                if damaged:
                    raise ValueError(f"the checksum of {damaged} is wrong")
        value = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(value)
    except pickle.UnpicklingError as e:  # torch's own words advise to switch its protection off
        raise ValueError(f"{str(path)!r} is damaged, or holds more than tensors and plain values, such as a whole module") from e
    except Exception as e:  # a damaged file raises anything, from EOFError to zlib's own class
        reason, _, _ = reason_of(e).partition(". ")  # torch goes on about how files come to be so
        raise ValueError(f"{str(path)!r} is damaged: {reason}") from e
    return value


def _check_tensors(value, depth: int = 0) -> None:
    import torch
    if depth > MOST_NESTED:
        raise ValueError(f"nested deeper than {MOST_NESTED}")
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"it holds a tensor that is not a plain one ({value.layout}, {value.device})")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"it holds a tensor of shape {list(value.shape)} without memory of its own")
    elif isinstance(value, (dict, list, tuple)):
        for v in value.values() if isinstance(value, dict) else value:
            _check_tensors(v, depth + 1)
