"""A picture of activation scales before and after folding: :func:`plot_ranges`."""

from pathlib import Path

import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase, DynamicActQuantProxyFromInjector
from torch import Tensor, nn

from granq_plugin.atomic import atomic_path

__all__ = ["activation_scales", "plot_ranges"]

DEAD = 1e-3
"""A channel whose scale is below this part of the activation's largest."""


def activation_scales(model: nn.Module) -> dict[str, Tensor]:
    """The scale of every channel, ``[C]``, of each static activation quantizer, by name; ``[1]`` for a scale per tensor."""
    return {
        name.removesuffix(".act_quant"): proxy.scale().detach().flatten().cpu() for name, proxy in model.named_modules()
        if isinstance(proxy, ActQuantProxyFromInjectorBase) and proxy.is_quant_enabled
        and not isinstance(proxy, DynamicActQuantProxyFromInjector)}


def plot_ranges(static: nn.Module, folded: nn.Module | None, path: str | Path) -> None:
    """Draw the scale of every channel of every activation, before and, where folding has made it one number, after folding.

    Above each activation stands how many times its largest scale is its smallest: what one range per tensor would waste. Channels
    below a thousandth of the largest are dead in all but name: they are counted at the lower edge.

    Args:
        static: the model before folding, with frozen ranges. folded: the same model after it; None: draw ``static`` alone.
        path: a PNG file.

    Raises:
        ValueError: if either has no static activation quantizer, or static has no ranges; for another kind of file.
        OSError: if the file cannot be written. ModuleNotFoundError: without matplotlib (extra ``zoo``).

    Example:
        >>> import tempfile
        >>> from granq_plugin import quantize, to_static
        >>> dynamic = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), weight_bit_width=4, act_bit_width=4)
        >>> static = to_static(dynamic, [torch.rand(16, 3, 6, 6)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_ranges(static, None, f"{folder}/ranges.png")
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG file: its name must end in .png, got {str(path)!r}")
    try:
        stages = {"before folding": activation_scales(static)}
        if folded is not None:
            stages["after folding"] = activation_scales(folded)
    except RuntimeError as e:  # no ranges yet
        raise ValueError(str(e)) from e
    for label, scales in stages.items():
        if not scales:
            raise ValueError(f"the model {label} has no static activation quantizer")
    names = list(dict.fromkeys(name for scales in reversed(stages.values()) for name in scales))  # folded: in order of execution
    if folded is None:
        stages = {"": stages["before folding"]}
    with atomic_path(path) as part:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
        figure = Figure(figsize=(max(8, 1.5 + 0.36 * len(names)), 4.8 + 1.8 * (len(stages) - 1)), layout="constrained")
        panels = figure.subplots(len(stages), 1, sharex=True, squeeze=False, height_ratios=(3, 1)[:len(stages)]).flatten()
        dead = 0
        for axes, (label, scales) in zip(panels, stages.items()):
            dead += sum(_column(axes, i, scales[name]) for i, name in enumerate(names) if name in scales)
            axes.set(yscale="log", title=label, xlim=(-0.7, len(names) - 0.3))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if label != "after folding" else (1, )))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.margins(y=0.15)
            axes.grid(alpha=0.3)
        panels[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=9)
        panels[0].set_ylabel("scale (real value of one step)")
        figure.suptitle("Activation scales: dots are channels, bars the smallest and the largest, numbers above their ratio"
                        + (";\ntriangles count channels below a thousandth of the largest" if dead else ""), fontsize=11)
        FigureCanvasAgg(figure).print_png(str(part))


def _column(axes, place: int, scale: Tensor) -> int:
    """Draw one activation; the number of its channels that a triangle counts."""
    alive = scale[scale >= DEAD * scale.max()]
    low, high = float(alive.min()), float(alive.max())
    jitter = torch.linspace(-0.3, 0.3, len(alive)) if len(alive) > 1 else torch.zeros(1)
    axes.scatter(place + jitter, alive, s=9, color="#0072B2", linewidths=0)
    axes.hlines([low, high], place - 0.38, place + 0.38, color="#D55E00", linewidth=1.5)
    if len(scale) > 1:
        ratio = high / low
        axes.annotate(f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}", (place, high), xytext=(0, 4), textcoords="offset points",
                      ha="center", fontsize=8)
    dead = len(scale) - len(alive)
    if dead:
        edge = axes.get_xaxis_transform()  # x: the activation's place, y: from the lower edge
        axes.plot(place - 0.15, 0.03, "v", color="#555555", markersize=5, transform=edge)
        axes.text(place + 0.02, 0.03, f"{dead}", va="center", fontsize=8, transform=edge)
    return dead
