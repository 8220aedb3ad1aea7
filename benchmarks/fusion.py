"""What does a BatchNorm ahead of the quantizer cost, in its kernel and as an operation of its own?

    python -m benchmarks.fusion [--threads 2] [--seconds 3]

ReLU and 4-bit dynamic GranQ of activations in float32 on CPU: alone, after a BatchNorm in evaluation mode, and after a BatchNorm
and a residual addition; in both memory formats, forward, and forward with the backward to input, weight, bias and residual. All
ways take turns, round after round, in one process; medians, each also as a ratio to ``torch.clone`` in the same rounds. Freed
memory is kept and used again. Writes ``fusion.csv`` into ``benchmarks/results``, and the table in docs/results.md.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.quantizer import BITS, HEADLINE, MODES, column_head, in_turns, keep_memory
from benchmarks.readme import replace_table
from benchmarks.rows import FORMATS, read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "fusion: written by python -m benchmarks.fusion"
FIELDS = ("threads", "shape", "memory_format", "mode", "method", "median_ms", "ratio_to_clone", "rounds")
LABELS = {
    "clone": "torch.clone", "relu_granq": "ReLU, GranQ", "norm_separate": "BatchNorm; ReLU, GranQ",
    "norm_fused": "BatchNorm, ReLU, GranQ in one", "sum_separate": "BatchNorm; addition; ReLU, GranQ",
    "sum_fused": "BatchNorm, addition, ReLU, GranQ in one"}
"""A semicolon stands between operations."""


def functions(shape: tuple[int, ...], memory_format: str, mode: str) -> dict[str, Callable]:
    """Each way as a function without arguments."""
    import torch

    from granq_plugin.kernels import Ahead, Before, granq
    x, residual, grad = (torch.randn(shape).contiguous(memory_format=getattr(torch, memory_format)) for _ in range(3))
    mean, var, weight, bias = torch.randn(4, shape[1])
    norm = Ahead(mean, var.square() + 0.1, weight, bias, 1e-5)
    total = norm._replace(residual=residual)

    def quantized(y, ahead=None):
        return granq(y, BITS, 1, Before(relu=True), ahead).value

    ways = dict(clone=(lambda: x.clone(), [x]), relu_granq=(lambda: quantized(x), [x]))
    for name, ahead in (("norm", norm), ("sum", total)):
        leaves = [x, *(t for t in ahead.leaves if t is not None)]
        ways[f"{name}_separate"] = lambda ahead=ahead: quantized(ahead.apply(x)), leaves
        ways[f"{name}_fused"] = lambda ahead=ahead: quantized(x, ahead), leaves
    if mode == "forward":
        return {name: torch.no_grad()(f) for name, (f, _) in ways.items()}
    for t in (x, residual, weight, bias):
        t.requires_grad_()
    return {name: lambda f=f, leaves=leaves: torch.autograd.grad(f(), leaves, grad) for name, (f, leaves) in ways.items()}


def measure(seconds: float) -> list[dict]:
    import torch
    rows = []
    for shape in HEADLINE:
        for memory_format in FORMATS:
            for mode in MODES:
                times = in_turns(functions(shape, memory_format, mode), seconds)
                floor = statistics.median(times["clone"])
                rows += [dict(zip(FIELDS, (
                    torch.get_num_threads(), "x".join(map(str, shape)), memory_format, mode, method, f"{statistics.median(t):.4f}",
                    f"{statistics.median(t) / floor:.3f}", len(t)))) for method, t in times.items()]
                click.echo(f"{shape} {memory_format} {mode}: " + ", ".join(
                    f"{r['method']} {r['ratio_to_clone']}" for r in rows[-len(times):]))
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: times as multiples of torch.clone's."""
    columns = list(dict.fromkeys((r["shape"], r["memory_format"], r["mode"]) for r in rows))
    cell = {(r["method"], (r["shape"], r["memory_format"], r["mode"])):
            f"{float(r['median_ms']):.2f} ms" if r["method"] == "clone" else f"{float(r['ratio_to_clone']):.2f}" for r in rows}
    heads = [f"{column_head(s, f)} {m}" for s, f, m in columns]
    lines = [f"CPU, {rows[0]['threads']} threads, float32, {BITS} bits; times as multiples of `torch.clone`'s (its milliseconds in "
             "the first row; cl: channels_last). A semicolon stands between operations of their own.", "",
             "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cell[method, c] for c in columns) + " |" for method, label in LABELS.items()]
    return "\n".join(lines)


def read_rows() -> list[dict]:
    return read(RESULTS / "fusion.csv")


@click.command(help=__doc__)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=3.0, show_default=True, help="for each shape, format and mode")
def main(threads: int, seconds: float) -> None:
    import torch
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_memory(True)
    write(RESULTS / "fusion.csv", FIELDS, measure(seconds))
    replace_table(MARKER, table(read_rows()))


if __name__ == "__main__":
    main()
