"""What stands first in the README, from the results of the other commands and the zoo's cards; nothing is measured here.

    python -m benchmarks.headline

Writes the README's first table and ``benchmarks/results/ladder.png``: accuracy from float down to the exported file.
"""

from pathlib import Path

import click

from benchmarks.readme import replace_table
from benchmarks.rows import read
from granq_plugin.atomic import atomic_path

RESULTS = Path(__file__).parent / "results"
MARKER = "headline: written by python -m benchmarks.headline"
NETWORKS = {"CIFAR-10": "resnet20_cifar10", "CIFAR-100": "resnet20_cifar100"}
BITS = (4, 3)
# line -> the weights and activations of benchmarks.accuracy (first network alone), or the zoo entry's suffix
UNTRAINED = {
    "Brevitas's own quantizers, activations per tensor; no training":
        ("per-output-channel, Brevitas stock", "static per-tensor, Brevitas stock"),
    "GranQ, dynamic ranges; no training": ("per-output-channel", "dynamic"),
}
TRAINED = {
    "GranQ, dynamic ranges; zero-shot QAT": "",
    "GranQ, static ranges with learned scales; zero-shot QAT": "_symmetric_static_learned",
    "GranQ, static ranges folded away for FPGAs; zero-shot QAT": "_folded",
}
RUNGS = {"dynamic": "dynamic ranges", "static": "static ranges", "folded": "folded for FPGAs", "exported file": "its ONNX file"}


def accuracies() -> dict[str, dict[tuple[str, int], float]]:
    """Line -> (network, bits) -> top-1 in percent."""
    import zoo
    full = {n: zoo.get_card(n).results.top1 for n in NETWORKS.values()}
    lines = {"full precision": {(n, b): top1 for n, top1 in full.items() for b in BITS}}
    measured = {(r["weights"], r["activations"], int(r["bits"])): float(r["top1"]) for r in read(RESULTS / "accuracy.csv")}
    first = next(iter(NETWORKS.values()))
    for line, regime in UNTRAINED.items():
        lines[line] = {(first, b): measured[(*regime, b)] for b in BITS}
    entries = set(zoo.list_models())
    for line, suffix in TRAINED.items():
        names = {(n, b): f"{n}.granq_w{b}a{b}{suffix}" for n in NETWORKS.values() for b in BITS}
        lines[line] = {key: zoo.get_card(name).results.top1 for key, name in names.items() if name in entries}
    return lines


def table(lines: dict[str, dict[tuple[str, int], float]], speeds: list[str]) -> str:
    """Markdown: a column per network and bit width, then the speeds."""
    columns = [(n, b) for n in NETWORKS.values() for b in BITS]
    heads = [f"{dataset}, {b} bits" for dataset in NETWORKS for b in BITS]
    text = [f"| ResNet-20, top-1 % | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    text += [f"| {line} | {' | '.join(f'{of[c]:.2f}' if c in of else '-' for c in columns)} |" for line, of in lines.items()]
    return "\n".join([*text, "", *(f"- {s}" for s in speeds)])


def speeds(quantizer: list[dict], recipe: list[dict], evaluate: list[dict], ladder: list[dict], on_gpu: list[dict]) -> list[str]:
    """Sentences about the exported files and about time, from the rows of the other commands."""
    ratio = {(r["shape"], r["mode"], r["method"]): float(r["ratio_to_clone"]) for r in quantizer}
    faster = [ratio[s, "forward", "brevitas_per_tensor"] / ratio[s, "forward", "granq"] for s in ("64x64x32x32", "16x256x56x56")]
    files = [r for r in ladder if r["rung"] == "exported file"]
    same, of = (sum(int(r[k]) for r in files) for k in ("same_top1_as_folded", "images"))
    loops = [float(r["ratio"]) for r in recipe if r["device"] == "cpu"]
    recorded: dict[str, list[float]] = {}
    for r in recipe:
        if r["compile"] == "cudagraphs":
            recorded.setdefault(r["device"], []).append(float(r["ratio"]))
    copies: dict[tuple[str, ...], list[float]] = {}
    for r in on_gpu:
        if (r["mode"], r["launch"]) == ("forward", "graph"):
            copies.setdefault((r["device"], r["method"], r["memory_format"]), []).append(float(r["ratio_to_clone"]))
    shares = [100 * float(r["ratio"]) for r in evaluate if (r["device"], r["network"]) == ("cpu", "dynamic")]
    return [
        f"Exported files ({len(files)}, in onnxruntime): the torch network's top-1 class on {same:,} of {of:,} images.",
        f"On the CPU, the activation quantizer's forward is {_span(faster, 0)} times as fast as Brevitas's dynamic one per tensor; "
        f"zero-shot QAT {_span(loops, 1)} times as fast as the published loop; a dynamic network evaluates {_span(shares, 0)} % of "
        "the images per second of its float one.",
        *(f"{device}: zero-shot QAT from CUDA graphs is {_span(ratios, 1)} times as fast as the published loop."
          for device, ratios in recorded.items()),
        *(f"{device}: the activation quantizer's forward takes {_span(ratios, 2)} times as long as copying the tensor "
          f"(channels_last {_span(copies[device, 'granq', 'channels_last'], 2)}), the published formula "
          f"{_span(copies[device, 'published', layout], 1)}."
          for (device, method, layout), ratios in copies.items() if (method, layout) == ("granq", "contiguous_format")
          and {(device, "granq", "channels_last"), (device, "published", layout)} <= copies.keys())]  # a run may have ended early


def _span(values: list[float], digits: int) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def current() -> str:
    """The table of the results that are there."""
    return table(accuracies(), speeds(*(read(RESULTS / f"{name}.csv") for name in (
        "quantizer", "recipe", "evaluate", "export_ladder", "quantizer_gpu"))))


def plot(ladder: list[dict], path: Path) -> None:
    """Bars of top-1 by rung, without and with zero-shot QAT, a panel per bit width; the float network's as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(BITS), sharey=True)
    for axes, bits in zip(panels, BITS):
        rows = [r for r in ladder if int(r["bits"]) == bits]
        percent = {(r["rung"], r["training"] != "none"): 100 * int(r["correct"]) / int(r["images"]) for r in rows}
        for trained, colour, hatch, label in ((False, "#E69F00", "///", "no training"), (True, "#56B4E9", "", "zero-shot QAT")):
            places = [i + (0.2 if trained else -0.2) for i in range(len(RUNGS))]
            values = [percent[rung, trained] for rung in RUNGS]
            axes.barh(places, values, 0.36, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, label=label)
            for place, value in zip(places, values):
                axes.text(value - 1, place, f"{value:.2f}", va="center", ha="right", fontsize=9,
                          bbox=dict(boxstyle="square,pad=0.15", facecolor="white", linewidth=0))
        full = percent["float", False]
        axes.axvline(full, color="black", linestyle="--", linewidth=1, label=f"float, {full:.2f} %")
        axes.set_title(f"W{bits}A{bits}", fontsize=11)
        axes.set(xlim=(0, 100), xlabel="top-1 accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(RUNGS)), list(RUNGS.values()), fontsize=10)
    panels[0].invert_yaxis()
    images = int(ladder[0]["images"])
    figure.suptitle(f"ResNet-20 on CIFAR-10, {images:,} test images, from float to the file", fontsize=12)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_figure(str(part), format="png", dpi=120)


@click.command(help=__doc__)
def main() -> None:
    plot(read(RESULTS / "export_ladder.csv"), RESULTS / "ladder.png")
    replace_table(MARKER, current())
    click.echo(current())


if __name__ == "__main__":
    main()
