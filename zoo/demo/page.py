"""The demo's report as one HTML file: :func:`page`."""

from importlib import resources
from pathlib import Path

from zoo.demo.pictures import LABELS, data_uri

__all__ = ["page"]


def page(report: dict, pictures: dict[str, Path]) -> str:
    """The report in HTML, pictures inside, nothing loaded from elsewhere; every value is escaped.

    Args:
        report: as in ``report.json``. pictures: of :func:`zoo.demo.pictures.draw`.
    """
    import jinja2
    template = resources.files("zoo").joinpath("demo", "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    steps = {step["key"]: step | dict(label=LABELS[step["key"]].format(bits=report["bits"])) for step in report["ladder"]}
    return environment.from_string(template).render(
        report, steps=steps, images={name: data_uri(path) for name, path in pictures.items()},
        rules_kept=sum(r["passed"] for r in report["finn"]))
