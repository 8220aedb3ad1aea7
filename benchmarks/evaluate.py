"""How many images per second does the zoo evaluate, quantized beside float?

    python -m benchmarks.evaluate --data DIR --weights FILE [--device cpu --threads 2 --compile off]

ResNet-20 on CIFAR-10 test images in memory, through ``zoo.evaluate``: float, and W4A4 with dynamic, static and folded activations,
in both memory formats; "loading" is the same without a network: batches, normalization, counting. Ranges come from random images,
which changes accuracy but not speed. Networks take turns; medians. With ``--compile cudagraphs`` the time to record a batch is part
of each turn. Replaces the rows of this device, threads (on the CPU) and --compile in
``benchmarks/results/evaluate.csv``, and writes the chart and the table in docs/results.md.
"""

import statistics
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from benchmarks.readme import replace_table
from benchmarks.rows import FORMATS, device_of, read, write
from granq_plugin.atomic import atomic_path
from granq_plugin.cli.options import compile_option

RESULTS = Path(__file__).parent / "results"
MARKER = "evaluate: written by python -m benchmarks.evaluate"
QUANTIZED = ("dynamic", "static", "folded")
KINDS = ("loading", "float", *QUANTIZED)
KEYS = ("device", "threads", "compile", "memory_format")
FIELDS = (*KEYS, "network", "images", "batch_size", "images_per_second", "ratio", "spread", "repeats")


class NoNetwork(nn.Module):
    """Takes the first values of an image for its logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :self.classes]


def networks(teacher: nn.Module, example_input: Tensor, bits: int) -> dict[str, nn.Module]:
    """A network of every kind, in evaluation mode."""
    import granq_plugin as gq
    from granq_plugin.deploy import bake
    from zoo.quantization import Quantization
    from zoo.students import calibrator
    batches = list(torch.randn(256, *example_input.shape[1:], generator=torch.Generator().manual_seed(0)).split(64))
    dynamic = Quantization(bits, bits, "per-output-channel-symmetric").build(teacher, example_input)
    folded = Quantization(bits, bits, "per-output-channel-symmetric", "folded").build(teacher, example_input, calibrator(batches))
    return dict(loading=NoNetwork(teacher(example_input).shape[1]), float=teacher, dynamic=dynamic.eval(),
                static=gq.to_static(dynamic, batches).eval(), folded=bake(folded).eval())


def measure(models: dict, test_set, preprocessing, batch_size: int, device: str, memory_format: str, repeats: int,
            compile: str = "off") -> dict[str, list[float]]:
    """Images per second of every network, ``repeats`` times, taking turns, after a warm-up batch."""
    from zoo.evaluate import evaluate

    def prepare(images: Tensor) -> Tensor:
        return preprocessing(images).contiguous(memory_format=getattr(torch, memory_format))
    for model in models.values():
        evaluate(model, test_set.subset(batch_size), prepare, batch_size, device)
    speeds = {kind: [] for kind in models}
    for _ in range(repeats):
        for kind, model in models.items():
            mode = "off" if kind == "loading" else compile
            speeds[kind].append(evaluate(model, test_set, prepare, batch_size, device, compile=mode).images_per_second)
    return speeds


def table(rows: list[dict]) -> str:
    """Images per second; in brackets the share of float's in the same setting."""
    heads = list(dict.fromkeys(map(_setting, rows)))
    cells = {(r["network"], _setting(r)): f"{float(r['images_per_second']):.0f}" + (
        f" ({100 * float(r['ratio']):.0f} %)" if r["network"] != "loading" else "") for r in rows}
    lines = ["| images/s | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {kind} | " + " | ".join(cells[kind, h] for h in heads) + " |" for kind in KINDS]
    return "\n".join(lines)


def _setting(row: dict) -> str:
    """What stands above its column, and in the legend."""
    return f"{device_of(row)}, {row['memory_format']}"


def plot(rows: list[dict], path: Path) -> None:
    """Bars of the share of float's images per second."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    settings = list(dict.fromkeys(map(_setting, rows)))
    for i, setting in enumerate(settings):
        share = {r["network"]: 100 * float(r["ratio"]) for r in rows if _setting(r) == setting}
        places = [k + i / (len(settings) + 1) for k in range(len(QUANTIZED))]
        axes.bar(places, [share[k] for k in QUANTIZED], 1 / (len(settings) + 1), label=setting)
    axes.axhline(100, color="black", linestyle="--", linewidth=1)
    axes.set_xticks([k + (len(settings) - 1) / 2 / (len(settings) + 1) for k in range(len(QUANTIZED))], QUANTIZED)
    axes.set_ylabel("images/s, % of float")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


def read_rows(path: Path = RESULTS / "evaluate.csv") -> list[dict]:
    return read(path)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), envvar="GRANQ_DATA", required=True)
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--bits", type=click.IntRange(1, 16), default=4, show_default=True)
@click.option("--images", "count", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@compile_option
def main(data, weights, bits, count, batch_size, repeats, device, threads, compile) -> None:
    import zoo
    from zoo.data import load_images
    from zoo.weights import load_weights
    torch.set_num_threads(threads)
    card = zoo.get_card("resnet20_cifar10")
    test_set = load_images(data, card.dataset).subset(count)
    teacher = card.build()
    load_weights(teacher, weights)
    models = networks(teacher, card.example_input(), bits)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    path, rows = RESULTS / "evaluate.csv", []
    for memory_format in FORMATS:
        speeds = measure(models, test_set, card.preprocessing, batch_size, device, memory_format, repeats, compile)
        medians = {kind: statistics.median(s) for kind, s in speeds.items()}
        rows += [dict(zip(FIELDS, (
            name, threads, compile, memory_format, kind, len(test_set), batch_size, f"{medians[kind]:.1f}",
            f"{medians[kind] / medians['float']:.3f}", f"{max(s) - min(s):.1f}", repeats))) for kind, s in speeds.items()]
        for row in rows[-len(KINDS):]:
            click.echo(row)
    replaced = set(map(_setting, rows))
    rows = [r for r in read_rows(path) if _setting(r) not in replaced] + rows
    rows.sort(key=lambda r: (r["device"], int(r["threads"]), r["compile"]))
    write(path, FIELDS, rows)
    plot(read_rows(path), RESULTS / "evaluate.png")
    replace_table(MARKER, table(read_rows(path)))


if __name__ == "__main__":
    main()
