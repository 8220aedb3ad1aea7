"""A picture of activation scales before and after folding: :func:`plot_ranges`."""

from pathlib import Path

import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase, DynamicActQuantProxyFromInjector
from torch import Tensor, nn

from granq_plugin.atomic import atomic_path

__all__ = ["activation_scales", "plot_ranges"]


def activation_scales(model: nn.Module) -> dict[str, Tensor]:
    """The scale of every channel, ``[C]``, of each static activation quantizer, by name; ``[1]`` for a scale per tensor."""
    return {
        name.removesuffix(".act_quant"): proxy.scale().detach().flatten().cpu() for name, proxy in model.named_modules()
        if isinstance(proxy, ActQuantProxyFromInjectorBase) and proxy.is_quant_enabled
        and not isinstance(proxy, DynamicActQuantProxyFromInjector)}


def plot_ranges(static: nn.Module, folded: nn.Module, path: str | Path) -> None:
    """Draw the scale of every channel of every activation, in ``static`` and, where folding has made it one number, in ``folded``.

    Args:
        static: the model before folding, with frozen ranges. folded: the same model after it. path: a PNG file.

    Raises:
        ValueError: if either has no static activation quantizer, or static has no ranges. OSError: if the file cannot be written.
        ModuleNotFoundError: without matplotlib (extra ``zoo``).
    """
    try:
        before, after = activation_scales(static), activation_scales(folded)
    except RuntimeError as e:  # no ranges yet
        raise ValueError(str(e)) from e
    before = {name: before[name] for name in after if name in before} | before  # folded: in the order of execution
    for label, scales in (("before", before), ("after", after)):
        if not scales:
            raise ValueError(f"the model {label} folding has no static activation quantizer")
    with atomic_path(path) as part:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, scales, title in ((panels[0], before, "before: one scale per channel"), (panels[1], after, "after folding")):
            for i, scale in enumerate(scales.values()):
                jitter = torch.linspace(-0.3, 0.3, len(scale)) if len(scale) > 1 else torch.zeros(1)
                axes.scatter(i + jitter, scale, s=5, color="#3B8FD4", alpha=0.7, linewidths=0)
                axes.hlines([scale.min(), scale.max()], i - 0.35, i + 0.35, color="#D55E00", linewidth=1)
            axes.set(yscale="log", title=title, xlabel="activation, in order")
            axes.set_xticks(range(len(scales)), list(scales), rotation=90, fontsize=6)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("scale (real value of one step)")
        figure.suptitle("Activation scales: dots are channels, bars the smallest and the largest")
        FigureCanvasAgg(figure).print_png(str(part))
