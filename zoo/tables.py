"""The results table, from the cards, and the published figures beside it."""

import csv
import io
from collections.abc import Iterable
from importlib import resources

from zoo.card import Card
from zoo.quantization import Quantization

__all__ = ["MARKER", "REGIMES", "network_of", "published", "regime_of", "table"]

MARKER = "zoo: written by granq zoo table"
REGIMES = (
    "dynamic", "dynamic, symmetric weights", "static", "static, symmetric weights", "static, learned scales",
    "static, learned scales, symmetric weights", "folded (FINN)",
    "per-kernel, dynamic (paper comparison only)", "per-kernel, static (paper comparison only)")
"""One column each. Weights are per output channel unless it says otherwise."""


def regime_of(quantization: Quantization) -> str:
    """The column of a network."""
    if quantization.activations == "folded":
        return "folded (FINN)"
    if quantization.weight_regime == "per-kernel":
        return f"per-kernel, {quantization.activations} (paper comparison only)"
    symmetric = ", symmetric weights" if quantization.weight_regime.endswith("symmetric") else ""
    learned = ", learned scales" if quantization.learned_scale else ""
    return quantization.activations + learned + symmetric


def network_of(card: Card) -> str:
    """The name of the float entry."""
    return card.name.split(".")[0]


def published() -> list[dict]:
    """Zero-shot QAT results of other papers: network, method, float_top1, and top-1 by bits ("W4A4", "W3A3"), None where unknown.

    Source: SynQ (ICLR 2025), table 1. Weights per output channel, activations per tensor, whole test sets, pytorchcv's teachers.
    """
    text = resources.files("zoo").joinpath("published.csv").read_text(encoding="utf-8")
    return [dict(network=r["network"], method=r["method"], float_top1=float(r["float_top1"]),
                 W4A4=float(r["w4a4"]) if r["w4a4"] else None, W3A3=float(r["w3a3"]) if r["w3a3"] else None)
            for r in csv.DictReader(io.StringIO(text))]


def table(cards: Iterable[Card]) -> str:
    """Markdown: a row per network, data and bit widths, a column per regime; then the published figures."""
    measured = [c for c in cards if c.results is not None]
    floats = {network_of(c): c for c in measured if c.quantization is None}
    cells: dict[tuple, dict[str, Card]] = {}
    for card in measured:
        if card.quantization is not None:
            key = (network_of(card), card.results.images, card.quantization.bits)
            cells.setdefault(key, {}).setdefault(regime_of(card.quantization), card)
    columns = [r for r in REGIMES if any(r in row for row in cells.values())]
    lines = ["| network | test images | full precision | bits | " + " | ".join(columns) + " |", "|---" * (4 + len(columns)) + "|"]
    for network, images, bits in sorted(cells, key=lambda k: (k[0], k[1], [-int(n) for n in k[2][1:].split("A")])):
        row = cells[network, images, bits]
        full = _full_precision(floats.get(network), row.values(), images)
        shown = [_cell(row[r], full) if r in row else "" for r in columns]
        lines.append(f"| {network} | {images} | {'-' if full is None else f'{full:.2f}'} | {bits} | {' | '.join(shown)} |")
    for name, card in sorted(floats.items()):
        if not any(key[0] == name for key in cells):
            lines.append(f"| {name} | {card.results.images} | {card.results.top1:.2f} | float |{'  |' * len(columns)}")
    return "\n".join(lines) + "\n\n" + _published_table()


def _full_precision(card: Card | None, row: Iterable[Card], images: int) -> float | None:
    """The teacher's top-1: as the quantized cards say, or the float entry's on the same images."""
    said = next((c.results.float_top1 for c in row if c.results.float_top1 is not None), None)
    if said is None and card is not None and card.results.images == images:
        return card.results.top1
    return said


def _cell(card: Card, full: float | None) -> str:
    retention = "" if full is None else f" ({card.results.top1 / full:.3f})"
    trained = "" if card.training is not None else " †"
    return f"{card.results.top1:.2f}{retention}{trained}"


def _published_table() -> str:
    rows = published()
    networks = list(dict.fromkeys(r["network"] for r in rows))
    full = {r["network"]: r["float_top1"] for r in rows}
    lines = ["| published, W4A4 / W3A3 | " + " | ".join(networks) + " |", "|---" * (1 + len(networks)) + "|",
             "| full precision | " + " | ".join(f"{full[n]:.2f}" for n in networks) + " |"]
    for method in dict.fromkeys(r["method"] for r in rows):
        by_network = {r["network"]: r for r in rows if r["method"] == method}
        shown = [" / ".join("-" if by_network[n][b] is None else f"{by_network[n][b]:.2f}" for b in ("W4A4", "W3A3"))
                 if n in by_network else "-" for n in networks]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)
