"""The README of this checkout, whose tables commands write (:mod:`zoo.readme`)."""

from pathlib import Path

from zoo import readme

README = Path(__file__).parent.parent / "README.md"


def replace_table(marker: str, table: str, path: Path = README) -> None:
    readme.replace_table(marker, table, path)


def current_table(marker: str, path: Path = README) -> str:
    return readme.current_table(marker, path)
