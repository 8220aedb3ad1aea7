"""Pictures of the results: accuracy against bit width and against bit operations, ours and published ones."""

from collections.abc import Iterable
from pathlib import Path

from granq_plugin.atomic import atomic_path
from zoo.card import Card
from zoo.tables import REGIMES, network_of, published, regime_of

__all__ = ["plot"]

# Okabe and Ito's colours, which all kinds of colour vision tell apart, and one more; a marker and a line of its own for each
_STYLES = dict(zip(REGIMES, (
    ("#0072B2", "o", "-"), ("#56B4E9", "^", "--"), ("#009E73", "s", "-."), ("#E69F00", "D", ":"), ("#F0E442", "h", "-"),
    ("#882255", "*", "--"), ("#D55E00", "P", "-"), ("#CC79A7", "v", "--"), ("#000000", "<", ":"))))
_PEER = dict(color="#777777", marker="x", linestyle="none", markersize=5)


def plot(cards: Iterable[Card], path: str | Path, against: str = "bits") -> None:
    """Draw a panel for each network with measured quantized entries; published results where both are of the whole test set.

    Args:
        against: "bits" (bit width of weights and activations) or "bit_operations" (per image; published networks stand at ours of
            the same bits).

    Raises:
        ValueError: if no quantized entry has been measured. OSError: if the file cannot be written.
    """
    measured = [c for c in cards if c.results is not None]
    networks = sorted({network_of(c) for c in measured if c.quantization is not None})
    if not networks:
        raise ValueError("no quantized zoo entry has results to draw")
    with atomic_path(path) as part:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        columns = min(len(networks), 2 if len(networks) == 4 else 3)
        rows = -(-len(networks) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.8 * rows + 1), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for unused in panels[len(networks):]:
            unused.set_axis_off()
        for axes, network in zip(panels, networks):
            _panel(axes, network, [c for c in measured if network_of(c) == network], against)
        for axes in panels[::columns]:
            axes.set_ylabel("top-1 accuracy, %")
        handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        FigureCanvasAgg(figure).print_png(str(part))


def _panel(axes, network: str, cards: list[Card], against: str) -> None:
    quantized = [c for c in cards if c.quantization is not None]
    full = [c.results.top1 for c in cards if c.quantization is None] + [c.results.float_top1 for c in quantized]
    full = next((f for f in full if f is not None), None)
    if full is not None:
        axes.axhline(full, color="black", linewidth=1, linestyle=(0, (6, 3)), label="full precision (ours)")
    positions = {}
    regimes = [r for r in _STYLES if any(regime_of(c.quantization) == r for c in quantized)]
    for i, regime in enumerate(regimes):
        color, marker, line = _STYLES[regime]
        of_regime = [(_position(c, against), c) for c in quantized if regime_of(c.quantization) == regime]
        of_regime = sorted((pair for pair in of_regime if pair[0] is not None), key=lambda pair: pair[0])
        if of_regime:
            positions = {c.quantization.bits: x for x, c in of_regime} | positions
            aside = 0.05 * (i - (len(regimes) - 1) / 2) if against == "bits" else 0  # markers of equal bits would hide each other
            axes.plot([x + aside for x, _ in of_regime], [c.results.top1 for _, c in of_regime], color=color, marker=marker,
                      linestyle=line, markersize=7, markeredgecolor="black", markeredgewidth=0.5, label=f"ours: {regime}")
    images = max(c.results.images for c in quantized)
    peers = [p for p in published() if p["network"] == network] if images >= 10_000 else []
    for i, peer in enumerate(peers):
        points = [(_bits(b) if against == "bits" else positions.get(b), peer[b]) for b in ("W4A4", "W3A3") if peer[b] is not None]
        points = [p for p in points if p[0] is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], label="published (see table; best one named)", **_PEER)
        if i == len(peers) - 1:
            for x, y in points:
                axes.annotate(peer["method"], (x, y), xytext=(7, -9), textcoords="offset points", fontsize=8, color="#444444")
    if peers:
        axes.axhline(peers[0]["float_top1"], color="#777777", linewidth=1, linestyle=":", label="full precision (published)")
    axes.set_title(f"{network}\n{images:,} test images", fontsize=10)
    axes.grid(alpha=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high - 5), high)  # tenths of a point must not look like a cliff
    if against == "bits":
        ticks = sorted({_position(c, against) for c in quantized} | ({3, 4} if peers else set()))
        axes.set_xticks(ticks, [f"W{t}A{t}" if t == int(t) else f"{t}" for t in ticks])
        axes.set_xlabel("bits of weights and activations")
        axes.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
    else:
        from matplotlib.ticker import EngFormatter, MaxNLocator
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("bit operations per image (MACs x bits x bits)")


def _bits(bits: str) -> float:
    weights, activations = (int(n) for n in bits[1:].split("A"))
    return weights if weights == activations else (weights + activations) / 2


def _position(card: Card, against: str) -> float | None:
    if against == "bits":
        return _bits(card.quantization.bits)
    return None if card.costs is None else card.costs.bit_operations
