"""The demo's pictures, each for a light and for a dark page."""

import base64
from pathlib import Path

import matplotlib
from torch import Tensor, nn

from granq_plugin.atomic import atomic_path
from granq_plugin.export import plot_ranges
from granq_plugin.zero_shot.plots import plot_images
from zoo.card import Card

__all__ = ["LABELS", "data_uri", "draw"]

LABELS = dict(
    float="float, 32 bits", before="{bits}, before training", dynamic="{bits}, after zero-shot QAT",
    static="{bits}, static ranges, after QAT",
    folded_before="{bits}, folded for FPGAs, before training", folded="{bits}, folded for FPGAs, after QAT")

_INK = {"light": "#1f2328", "dark": "#e6e8eb"}
_PAPER = {"light": "#ffffff", "dark": "#1b1f24"}  # as in page.html
_BAR, _REFERENCE = "#4c8fd6", "#d55e00"


def draw(
        out: Path, ladder: list[dict], bits: str, generated: Tensor, real: Tensor, labels: Tensor, static: nn.Module,
        folded: nn.Module, card: Card) -> dict[str, Path]:
    """Write ``ladder.png``, ``ranges.png`` (each also as ``*_dark.png``), ``generated.png`` and ``real.png``; paths by name.

    Args:
        ladder, bits: see ``report.json``. generated: normalized images, of all classes in turn.
        real, labels: normalized test images. static, folded: see :func:`granq_plugin.export.plot_ranges`.
    """
    paths = {name: out / f"{name}.png" for name in ("generated", "real")}
    normalization = card.preprocessing.mean, card.preprocessing.std
    columns = dict(columns=card.num_classes, headings=[str(label) for label in range(card.num_classes)])
    plot_images(generated, paths["generated"], *normalization, **columns)
    rows = [(labels == label).nonzero().flatten()[:len(generated) // card.num_classes] for label in range(card.num_classes)]
    in_turn = [int(row[i]) for i in range(min(map(len, rows))) for row in rows]
    plot_images(real[in_turn], paths["real"], *normalization, **columns)
    for style, suffix in (("light", ""), ("dark", "_dark")):
        ink, paper = _INK[style], _PAPER[style]
        colours = {f"{part}.color": ink for part in ("text", "xtick", "ytick")} | {
            "axes.labelcolor": ink, "axes.edgecolor": ink, "figure.facecolor": paper, "axes.facecolor": paper,
            "savefig.facecolor": paper, "grid.color": ink}
        paths |= {f"{name}{suffix}": out / f"{name}{suffix}.png" for name in ("ladder", "ranges")}
        with matplotlib.rc_context(colours | {"figure.dpi": 150, "savefig.dpi": 150}):
            _ladder(ladder, bits, ink, paths[f"ladder{suffix}"])
            plot_ranges(static, folded, paths[f"ranges{suffix}"])
    return paths


def _ladder(ladder: list[dict], bits: str, ink: str, path: Path) -> None:
    """Bars of top-1 with their 95 % intervals, the float network's as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.5, 0.55 * len(ladder) + 0.9), layout="constrained")
    axes = figure.subplots()
    top1 = [step["top1"] for step in ladder]
    # intervals of a few hundred images are wide: bars start where they can be told apart
    start = max(0, 10 * int(min(step["low"] for step in ladder) / 10) - 10)
    errors = [[step["top1"] - step["low"] for step in ladder], [step["high"] - step["top1"] for step in ladder]]
    axes.barh(range(len(ladder)), top1, 0.62, color=_BAR, hatch=["//"] + [""] * (len(ladder) - 1), edgecolor=ink, linewidth=0.6)
    axes.errorbar(top1, range(len(ladder)), xerr=errors, fmt="none", ecolor=ink, elinewidth=1, capsize=3)
    axes.axvline(top1[0], color=_REFERENCE, linewidth=1, linestyle="--")
    for i, step in enumerate(ladder):
        axes.text(100 + 0.01 * (100 - start), i, f"{step['top1']:.2f} %", va="center", fontsize=10)
    axes.set_yticks(range(len(ladder)), [LABELS[step["key"]].format(bits=bits) for step in ladder])
    axes.invert_yaxis()
    axes.set(xlim=(start, 100), xlabel=f"top-1 accuracy on the test images, from {start} %; whiskers: 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
