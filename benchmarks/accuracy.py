"""How much accuracy does quantization cost, without any training?

    python -m benchmarks.accuracy --data DIR --weights FILE --calibration-data FILE

Evaluates resnet20_cifar10 on the full test set at several bit widths, for every regime, and a stock Brevitas quantizer beside
them. Writes ``benchmarks/results/accuracy.csv`` and ``.png``, and the table in docs/results.md.
"""

from pathlib import Path

import click

from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
NETWORK = "resnet20_cifar10"
BIT_WIDTHS = (8, 5, 4, 3)
MARKER = "accuracy: written by python -m benchmarks.accuracy"
FIELDS = ("weights", "activations", "bits", "float_top1", "top1", "correct", "images", "weights_sha256", "calibration")

# label of the weights -> (weight quantizer, label of the activations -> activation quantizer)
REGIMES = {
    "per-output-channel": ("GranQWeightPerChannel", ("dynamic", "static")),
    "per-output-channel, symmetric": ("GranQWeightPerChannelSymmetric", ("dynamic", "static")),
    "per-output-channel, Brevitas stock": ("stock", ("static per-tensor, Brevitas stock", )),
    "per-kernel (paper comparison only)": ("GranQWeightPerKernel", ("dynamic", "static")),
}


def quantized_network(model, weights: str, activations: str, bits: int, calibration_batches):
    """The float ``model`` in one regime; ``calibration_batches()`` gives the inputs that static ranges are collected from."""
    import torch
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    import granq_plugin as gq
    quantizer, _ = REGIMES[weights]
    if quantizer == "stock":
        network = gq.quantize(model, bits, bits, weight_quant=Int8WeightPerChannelFloat, act_quant=Uint8ActPerTensorFloat).eval()
        with torch.no_grad(), calibration_mode(network):
            for batch in calibration_batches():
                network(batch)
        return network
    network = gq.quantize(model, bits, bits, weight_quant=getattr(gq, quantizer))
    return gq.to_static(network, calibration_batches()) if activations == "static" else network


def table(rows: list[dict]) -> str:
    """Markdown: one line per regime, one column per bit width, top-1 in percent."""
    bits = sorted({int(r["bits"]) for r in rows}, reverse=True)
    first = rows[0]
    lines = [
        f"ResNet-20 on CIFAR-10, {first['images']} test images, top-1 %, **no training**. Full precision: {first['float_top1']} % "
        f"(weights SHA-256 `{first['weights_sha256'][:12]}`…). Static ranges: {first['calibration']}.", "",
        "| weights | activations | " + " | ".join(f"W{b}A{b}" for b in bits) + " |", "|---|---|" + "---|" * len(bits)]
    cells = {(r["weights"], r["activations"], int(r["bits"])): r["top1"] for r in rows}
    for weights, activations in dict.fromkeys((r["weights"], r["activations"]) for r in rows):
        lines.append(f"| {weights} | {activations} | " + " | ".join(cells[weights, activations, b] for b in bits) + " |")
    return "\n".join(lines)


def read_rows(path: Path = RESULTS / "accuracy.csv") -> list[dict]:
    return read(path)


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against bit width, one line per regime; markers and dashes tell the lines apart without colour."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    colours = dict(zip(REGIMES, ("#0072B2", "#E69F00", "#555555", "#CC79A7")))
    shapes = dict(zip(REGIMES, "os^D"))
    for weights, activations in dict.fromkeys((r["weights"], r["activations"]) for r in rows):
        of_regime = (r for r in rows if (r["weights"], r["activations"]) == (weights, activations))
        points = sorted((int(r["bits"]), float(r["top1"])) for r in of_regime)
        dashed = activations != "dynamic"
        axes.plot(*zip(*points), marker=shapes[weights], color=colours[weights], linestyle="--" if dashed else "-",
                  markerfacecolor="white" if dashed else None, label=f"{weights}; {activations}")
    full_precision = float(rows[0]["float_top1"])
    axes.axhline(full_precision, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(f"float {full_precision} %", (3, full_precision), va="bottom", fontsize=8)
    axes.set(xlabel="bit width of weights and activations", ylabel="CIFAR-10 top-1 (%)",
             xticks=sorted({int(r["bits"]) for r in rows}), title="ResNet-20, quantized without training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right", title="weights; activations", title_fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), envvar="GRANQ_DATA", required=True)
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--calibration-data", type=click.Path(path_type=Path), required=True)
@click.option("--calibration-images", default=1000, show_default=True)
def main(data: Path, weights: Path, calibration_data: Path, calibration_images: int) -> None:
    from tqdm import tqdm

    import zoo
    from zoo.data import load_images, read_npz
    from zoo.evaluate import evaluate, input_batches
    from zoo.weights import load_weights, sha256
    card = zoo.get_card(NETWORK)
    model = card.build()
    load_weights(model, weights)
    test_set = load_images(data, card.dataset)
    chosen = read_npz(calibration_data).subset(calibration_images)
    full_precision = evaluate(model, test_set, card.preprocessing)
    jobs = [(w, a, b) for w, (_, activations) in REGIMES.items() for a in activations for b in BIT_WIDTHS]
    weights_sha256, rows = sha256(weights), []
    for regime, activations, bits in tqdm(jobs, unit="network"):
        network = quantized_network(
            model, regime, activations, bits, lambda: input_batches(chosen.images, card.preprocessing, 250))
        accuracy = evaluate(network, test_set, card.preprocessing)
        rows.append(dict(
            weights=regime, activations=activations, bits=str(bits), float_top1=f"{full_precision.top1:.2f}",
            top1=f"{accuracy.top1:.2f}", correct=accuracy.correct, images=accuracy.total, weights_sha256=weights_sha256,
            calibration=f"{len(chosen)} unlabelled images of {calibration_data.parent.name}/{calibration_data.name}"))
    write(RESULTS / "accuracy.csv", FIELDS, rows)
    rows = read_rows()
    plot(rows, RESULTS / "accuracy.png")
    replace_table(MARKER, table(rows))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
