"""How long is an iteration of zero-shot QAT, beside the loop as it is published, and where does the time go?

    python -m benchmarks.recipe [--network resnet20 --batch-size 200 --device cpu --threads 2] [--table-only]

Networks with fresh weights, 3 bits, weights per kernel (the published regime). Both loops take turns in one process; medians of
whole iterations, optimizers included. Then both run in phases (benchmarks/recipe_profile.py), in turns too. Replaces the rows of
these networks, batch sizes, devices, threads and ways of compiling in ``benchmarks/results/recipe.csv`` and
``recipe_profile.csv``, and both tables in docs/results.md.
"""

import statistics
import time
from pathlib import Path

import click

from benchmarks.readme import replace_table
from benchmarks.rows import device_of, read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "recipe: written by python -m benchmarks.recipe"
KEYS = ("network", "device", "threads", "batch_size", "compile")
FIELDS = (*KEYS, "published_ms", "ours_ms", "ratio", "published_spread_ms", "ours_spread_ms", "repeats")
PROFILE_FIELDS = (*KEYS, "phase", "published_ms", "ours_ms")
# name -> (function of zoo.models.cifar_resnet or torchvision.models, preset)
NETWORKS = {
    "resnet20": ("zoo.models.cifar_resnet:resnet20", "cifar10"),
    "resnet18": ("torchvision.models:resnet18", "imagenet_resnet18"),
    "resnet50": ("torchvision.models:resnet50", "imagenet_resnet50"),
    "mobilenet_v2": ("torchvision.models:mobilenet_v2", "imagenet_mobilenet_v2"),
}


def loops(network: str, batch_size: int, device: str, **settings) -> tuple:
    """``(published loop, our training, noise, labels)``, on the same teacher."""
    import copy
    import importlib

    import torch

    import granq_plugin as gq
    from benchmarks import published_loop
    from granq_plugin.zero_shot import preset
    from granq_plugin.zero_shot.training import Training
    torch.manual_seed(0)
    where, preset_name = NETWORKS[network]
    config = preset(preset_name, batch_size=batch_size, warmup_epochs=0, **settings)
    module, function = where.split(":")
    teacher = getattr(importlib.import_module(module), function)(num_classes=config.num_classes).eval().to(device)
    student = gq.quantize(teacher, 3, 3, weight_quant=gq.GranQWeightPerKernel).eval()
    generator = published_loop.Generator(config.image_size, config.num_classes).to(device)
    published = published_loop.PublishedLoop(
        copy.deepcopy(teacher), published_loop.printed_student(teacher, 3), generator, config)
    training = Training(student, teacher.requires_grad_(False), config, None)
    noise = torch.randn(batch_size, config.latent_dim, device=device)
    return published, training, noise, torch.randint(config.num_classes, (batch_size, ), device=device)


def measure(functions: tuple, repeats: int, device: str) -> list[list[float]]:
    """Milliseconds of each function, taking turns, after a warm-up each; what is recorded on a GPU then is."""
    import torch
    on_gpu = device.startswith("cuda")
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for f in functions:
        for _ in range(5 if on_gpu else 1):
            f()
    times = [[] for _ in functions]
    for _ in range(repeats):
        for f, of_f in zip(functions, times):
            synchronize()
            start = time.perf_counter()
            f()
            synchronize()
            of_f.append(1000 * (time.perf_counter() - start))
    return times


def profile(published, training, noise, labels, repeats: int, device: str) -> list[dict]:
    """Medians of every phase: ``phase``, ``published_ms``, ``ours_ms``."""
    from benchmarks.recipe_profile import PHASES, Clock, our_phases, published_phases
    runs = []
    for _ in range(repeats):
        clocks = Clock(device), Clock(device)
        published_phases(published, noise, labels, clocks[0])
        our_phases(training, noise, labels, clocks[1])
        runs.append([c.milliseconds for c in clocks])
    medians = ([statistics.median(r[i][phase] for r in runs) for phase in PHASES] for i in (0, 1))
    return [dict(phase=p, published_ms=f"{a:.1f}", ours_ms=f"{b:.1f}") for p, a, b in zip(PHASES, *medians)]


def table(rows: list[dict]) -> str:
    """Iterations per second of both loops."""
    lines = ["| network | device | batch | published loop | ours | ratio |", "|---|---|---|---|---|---|"]
    lines += [f"| {r['network']} | {device_of(r)} | {r['batch_size']} | {1000 / float(r['published_ms']):.2f} it/s | "
              f"{1000 / float(r['ours_ms']):.2f} it/s | {float(r['ratio']):.2f}x |" for r in rows]
    return "\n".join(lines)


def profile_table(rows: list[dict]) -> str:
    """Milliseconds by phase, published -> ours, a column for each setting."""
    settings = list(dict.fromkeys(_key(r) for r in rows))
    cells = {(_key(r), r["phase"]): f"{float(r['published_ms']):.0f} → {float(r['ours_ms']):.0f}" for r in rows}
    heads = [f"{s[0]}, {device_of(dict(zip(KEYS, s)))}, batch {s[3]}" for s in settings]
    lines = ["| ms: published → ours | " + " | ".join(heads) + " |", "|---" * (len(settings) + 1) + "|"]
    lines += [f"| {phase} | " + " | ".join(cells[s, phase] for s in settings) + " |"
              for phase in dict.fromkeys(r["phase"] for r in rows)]
    return "\n".join(lines)


def tables() -> str:
    """What stands in docs/results.md."""
    return table(read_rows()) + "\n\n" + profile_table(read_rows(RESULTS / "recipe_profile.csv"))


def _key(row: dict) -> tuple[str, ...]:
    return tuple(str(row[k]) for k in KEYS)


def read_rows(path: Path = RESULTS / "recipe.csv") -> list[dict]:
    return read(path)


def merge_rows(path: Path, fields: tuple[str, ...], rows: list[dict]) -> None:
    """Rows of the settings that were measured take the place of the old ones; in the order of networks, devices and batch sizes."""
    measured = {_key(r) for r in rows}
    kept = [r for r in read_rows(path) if _key(r) not in measured]
    order = list(NETWORKS)
    merged = sorted(kept + rows, key=lambda r: (
        order.index(r["network"]), r["device"], int(r["threads"]), int(r["batch_size"]), r["compile"] != "off"))
    write(path, fields, merged)


@click.command(help=__doc__)
@click.option("--network", "networks", type=click.Choice(list(NETWORKS)), multiple=True, default=("resnet20", ), show_default=True)
@click.option("--batch-size", "batch_sizes", type=click.IntRange(min=2), multiple=True, default=(16, 200), show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=9, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--compile", "mode", type=click.Choice(["off", "default", "cudagraphs"]), default="off", show_default=True,
              help="Of ours; cudagraphs needs a GPU, where small batches are bound by launches. Phases are timed with off alone.")
@click.option("--table-only", is_flag=True, help="Write the tables of docs/results.md from the CSV files that are there.")
def main(networks, batch_sizes, repeats, device, threads, mode, table_only) -> None:
    import torch
    torch.set_num_threads(threads)
    for network in () if table_only else networks:
        for batch_size in batch_sizes:
            published, training, noise, labels = loops(network, batch_size, device, compile=mode)
            functions = (lambda: published.step(noise, labels), training.step)  # noqa: B023
            times = [sorted(t) for t in measure(functions, repeats, device)]
            medians = [statistics.median(t) for t in times]
            key = dict(network=network, device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
                       threads=threads, batch_size=batch_size, compile=mode)
            row = dict(
                **key, published_ms=f"{medians[0]:.1f}", ours_ms=f"{medians[1]:.1f}", ratio=f"{medians[0] / medians[1]:.3f}",
                published_spread_ms=f"{times[0][-1] - times[0][0]:.1f}", ours_spread_ms=f"{times[1][-1] - times[1][0]:.1f}",
                repeats=repeats)
            click.echo(row)
            merge_rows(RESULTS / "recipe.csv", FIELDS, [row])
            if mode != "off":
                continue
            phases = [key | p for p in profile(published, training, noise, labels, (repeats + 1) // 2, device)]
            merge_rows(RESULTS / "recipe_profile.csv", PROFILE_FIELDS, phases)
    replace_table(MARKER, tables())


if __name__ == "__main__":
    main()
