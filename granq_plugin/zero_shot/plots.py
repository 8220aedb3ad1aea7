"""Pictures of a run."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from granq_plugin.atomic import atomic_path

__all__ = ["plot_curves", "plot_images"]


def plot_images(
        images: Tensor, path: str | Path, mean: Sequence[float], std: Sequence[float], columns: int | None = None) -> None:
    """Write a PNG grid of normalized images ``[N, C, S, S]`` (1 or 3 channels); mean and std undo the normalization.

    Args:
        columns: images in a row; None: as many as rows.
    """
    plt = _pyplot()
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    shape = (1, -1, 1, 1)
    pixels = (images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)
    size = images.shape[-1]
    grid = torch.ones(images.shape[1], rows * (size + 2), columns * (size + 2))
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (size + 2), (i % columns) * (size + 2)
        grid[:, top:top + size, left:left + size] = image
    picture = grid.permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1)
    with atomic_path(path) as part:
        plt.imsave(part, picture.expand(-1, -1, 3).contiguous().numpy(), format="png")


def plot_curves(metrics: Sequence[dict], path: str | Path) -> None:
    """Write a PNG of losses, agreement and accuracy (where there is one) against iterations."""
    plt = _pyplot()
    panels = [("losses of the generator", ("loss_generator", "loss_bn"), False), ("loss of the student", ("loss_student", ), True),
              ("agreement on synthetic images, test accuracy", ("agreement", "accuracy"), False)]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, (title, names, logarithmic) in zip(axes, panels):
        for name, style in zip(names, ("-", "--")):
            points = [(row["iterations"], 100 * row[name] if name == "agreement" else row[name]) for row in metrics if name in row]
            if points:
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points), style, marker=marker, markersize=3, label=name.replace("_", " "))
        axis.set(title=title, xlabel="iterations", yscale="log" if logarithmic else "linear")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[2].set_ylabel("%")
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
