"""Results as CSV files: whole or not there, every value a string when read back."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from granq_plugin.atomic import atomic_path

__all__ = ["FORMATS", "device_of", "read", "write"]

FORMATS = ("contiguous_format", "channels_last")  # of memory, as torch calls them


def read(path: Path) -> list[dict]:
    """The rows of a file; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write(path: Path, fields: Sequence[str], rows: Iterable[dict]) -> None:
    """Write rows under a header; a field that a row lacks is empty."""
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def device_of(row: dict) -> str:
    """What tables call the device of a row (``device``, ``threads``, ``compile``)."""
    if row["device"] == "cpu":
        return f"cpu, {row['threads']} thread{'s' if int(row['threads']) > 1 else ''}"
    return row["device"] + (", CUDA graphs" if row["compile"] == "cudagraphs" else "")
