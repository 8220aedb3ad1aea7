"""How long is an iteration of zero-shot QAT, beside the loop as it is published?

    python -m benchmarks.recipe [--batch-size 16 --batch-size 200] [--device cpu --threads 2]

ResNet-20 with fresh weights, 3 bits, weights per kernel (the published regime). Both loops take turns in one process; medians.
"student" is the student's part of an iteration, "iteration" all of it, optimizers included. Writes
``benchmarks/results/recipe.csv`` and the table in the README.
"""

import csv
import statistics
import time
from pathlib import Path

import click

from benchmarks.readme import replace_table

RESULTS = Path(__file__).parent / "results"
MARKER = "recipe: written by python -m benchmarks.recipe"
FIELDS = ("device", "threads", "batch_size", "part", "published_ms", "ours_ms", "ratio", "published_spread_ms", "ours_spread_ms",
          "repeats")


def parts(batch_size: int, device: str) -> dict[str, tuple]:
    """Functions to time: part -> (published, ours)."""
    import copy

    import torch

    import granq_plugin as gq
    from benchmarks import published_loop
    from granq_plugin.zero_shot import losses, preset
    from granq_plugin.zero_shot.training import Training
    from zoo.models.cifar_resnet import resnet20
    torch.manual_seed(0)
    config = preset("cifar10", batch_size=batch_size, warmup_epochs=0)
    teacher = resnet20(10).eval().to(device)
    student = gq.quantize(teacher, 3, 3, weight_quant=gq.GranQWeightPerKernel).eval()
    loop = published_loop.PublishedLoop(
        copy.deepcopy(teacher), published_loop.printed_student(teacher, 3), published_loop.Generator(32, 10).to(device), config)
    training = Training(student, teacher.requires_grad_(False), config, None)
    noise, labels = torch.randn(batch_size, 100, device=device), torch.randint(10, (batch_size, ), device=device)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    t, upstream = teacher(images), torch.randn(batch_size, 10, device=device)
    params = list(student.parameters())

    def published_student() -> None:
        x = images.clone().requires_grad_()
        loop.student(x).backward(upstream)
        loop.student_optimizer.zero_grad()
        losses.student_loss(t, loop.student(images), 20.0).backward()
        loop.student_optimizer.step()

    def our_student() -> None:
        x = images.clone().requires_grad_()
        q = student(x)
        torch.autograd.grad(q, x, upstream, retain_graph=True)
        for p, g in zip(params, torch.autograd.grad(losses.student_loss(t, q, 20.0), params)):
            p.grad = g
        training.optimizer.step()

    return dict(student=(published_student, our_student), iteration=(lambda: loop.step(noise, labels), training.step))


def measure(functions: tuple, repeats: int, device: str) -> list[list[float]]:
    """Milliseconds of each function, taking turns, after one warm-up each."""
    import torch
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for f in functions:
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


def table(rows: list[dict]) -> str:
    lines = ["| device | batch | part | published loop | ours | ratio |", "|---|---|---|---|---|---|"]
    lines += [f"| {r['device']}, {r['threads']} thread{'s' if int(r['threads']) > 1 else ''} | {r['batch_size']} | {r['part']} | "
              f"{float(r['published_ms']):.0f} ms | {float(r['ours_ms']):.0f} ms | {float(r['ratio']):.2f}x |" for r in rows]
    return "\n".join(lines)


def read_rows(path: Path = RESULTS / "recipe.csv") -> list[dict]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@click.command(help=__doc__)
@click.option("--batch-size", "batch_sizes", type=click.IntRange(min=2), multiple=True, default=(16, 200), show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=9, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(batch_sizes, repeats, device, threads) -> None:
    import torch
    torch.set_num_threads(threads)
    rows = []
    for batch_size in batch_sizes:
        for part, functions in parts(batch_size, device).items():
            published, ours = (sorted(t) for t in measure(functions, repeats, device))
            medians = statistics.median(published), statistics.median(ours)
            rows.append(dict(
                device=device, threads=threads, batch_size=batch_size, part=part, published_ms=f"{medians[0]:.1f}",
                ours_ms=f"{medians[1]:.1f}", ratio=f"{medians[0] / medians[1]:.3f}",
                published_spread_ms=f"{published[-1] - published[0]:.1f}", ours_spread_ms=f"{ours[-1] - ours[0]:.1f}",
                repeats=repeats))
            click.echo(rows[-1])
    RESULTS.mkdir(exist_ok=True)
    part_file = RESULTS / "recipe.csv.part"
    with open(part_file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part_file.replace(RESULTS / "recipe.csv")
    replace_table(MARKER, table(read_rows()))


if __name__ == "__main__":
    main()
