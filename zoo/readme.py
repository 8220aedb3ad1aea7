"""Tables in a README or another page stand between markers, and only commands write them."""

from pathlib import Path

from granq_plugin.atomic import write_text

__all__ = ["current_table", "replace_table"]


def _markers(marker: str) -> tuple[str, str]:
    return f"<!-- {marker} -->", f"<!-- /{marker.split(':')[0]} -->"


def _split(marker: str, readme: Path) -> tuple[str, str, str]:
    start, end = _markers(marker)
    text = readme.read_text(encoding="utf-8")
    if text.count(start) != 1 or end not in text.split(start)[1]:
        raise ValueError(f"{str(readme)!r} needs one pair of markers {start} ... {end}")
    head, rest = text.split(start)
    table, tail = rest.split(end, 1)
    return head, table, tail


def replace_table(marker: str, table: str, readme: str | Path) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /first word of marker -->``.

    Raises:
        ValueError: if there is no such pair.
    """
    readme = Path(readme)
    head, _, tail = _split(marker, readme)
    start, end = _markers(marker)
    write_text(readme, f"{head}{start}\n{table}\n{end}{tail}")


def current_table(marker: str, readme: str | Path) -> str:
    """What stands there now."""
    return _split(marker, Path(readme))[1].strip()
