"""Pictures of a run."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from granq_plugin.atomic import atomic_path

__all__ = ["plot_curves", "plot_images"]

WIDTH = 600
"""Of a picture of images, about, in pixels."""

PANELS = (
    ("loss of the generator", dict(loss_generator="all of it", loss_bn="distance from BatchNorm statistics"), False),
    ("loss of the student", dict(loss_student="distance from the teacher's answers"), True),
    ("agreement with the teacher", dict(agreement="of answers, synthetic images", accuracy="accuracy, test images"), False))
"""Title, names and words of metrics, whether logarithmic."""


def plot_images(
        images: Tensor, path: str | Path, mean: Sequence[float], std: Sequence[float], columns: int | None = None,
        headings: Sequence[str] = ()) -> None:
    """Write a PNG grid of normalized images ``[N, C, S, S]`` (of 3 channels in colour, of others the first in grey); mean and std
    undo the normalization.

    Pixels are squares of equal size, so many that the picture is about 600 wide.

    Args:
        columns: images in a row; None: as many as rows. headings: a word above each column.
    """
    _pyplot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    if images.shape[1] != 3:
        images, mean, std = images[:, :1], mean[:1], std[:1]
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    shape = (1, -1, 1, 1)
    pixels = (images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)
    size = images.shape[-1]
    grid = torch.ones(images.shape[1], rows * (size + 2), columns * (size + 2))
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (size + 2), (i % columns) * (size + 2)
        grid[:, top:top + size, left:left + size] = image
    factor = max(2, round(WIDTH / grid.shape[2]))
    picture = grid.permute(1, 2, 0).repeat_interleave(factor, 0).repeat_interleave(factor, 1).expand(-1, -1, 3)
    height, width = picture.shape[:2]
    above = 22 if headings else 0
    figure = Figure(figsize=(width / 100, (height + above) / 100), dpi=100, facecolor="white")
    figure.figimage(picture.contiguous().numpy(), origin="upper")
    for i, heading in enumerate(headings):
        figure.text((i * (size + 2) + size / 2) * factor / width, (height + above / 2) / (height + above), heading, ha="center",
                    va="center", fontsize=9, color="black")
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))


def plot_curves(metrics: Sequence[dict], path: str | Path) -> None:
    """Write a PNG of losses, agreement and accuracy against iterations; what a run has none of is left out."""
    plt = _pyplot()
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
    panels = [panel for panel in PANELS if any(name in row for name in panel[1] for row in metrics)] or PANELS[1:]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (title, names, logarithmic) in zip(axes[0], panels):
        for (name, label), style in zip(names.items(), ("-", "--")):
            points = [(row["iterations"], 100 * row[name] if name == "agreement" else row[name]) for row in metrics if name in row]
            if points:
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points), style, marker=marker, markersize=3, label=label)
        axis.set(title=title, xlabel="iterations")
        if logarithmic and any(y > 0 for line in axis.lines for y in line.get_ydata()):
            axis.set_yscale("log")
            low, high = axis.get_ylim()  # a decade and less: evenly spaced numbers
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(5))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        if "agreement" in names:
            axis.set_ylabel("%")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("pictures need matplotlib: pip install 'granq-plugin[zoo]'") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
