"""The pages of this checkout whose tables commands write (:mod:`zoo.readme`): each pair of markers stands in one of them."""

from pathlib import Path

from zoo import readme

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def page_of(marker: str) -> Path:
    """The page that has the marker; the last one, whose error will name it, if none has."""
    return next((p for p in PAGES if f"<!-- {marker} -->" in p.read_text(encoding="utf-8")), PAGES[-1])


def replace_table(marker: str, table: str, path: Path | None = None) -> None:
    readme.replace_table(marker, table, path or page_of(marker))


def current_table(marker: str, path: Path | None = None) -> str:
    return readme.current_table(marker, path or page_of(marker))
