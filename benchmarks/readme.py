"""Tables in the README stand between markers, and only commands write them."""

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def replace_table(marker: str, table: str, readme: Path = README) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /first word of marker -->``."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker.split(':')[0]} -->"
    head, rest = readme.read_text(encoding="utf-8").split(start)
    _, tail = rest.split(end)
    readme.write_text(f"{head}{start}\n{table}\n{end}{tail}", encoding="utf-8")


def current_table(marker: str, readme: Path = README) -> str:
    """What stands there now."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker.split(':')[0]} -->"
    return readme.read_text(encoding="utf-8").split(start)[1].split(end)[0].strip()
