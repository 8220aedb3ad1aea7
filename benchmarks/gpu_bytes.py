"""What must a GPU read and write for each quantizer? An estimate of their times, beside what was measured.

    python -m benchmarks.gpu_bytes

Quantizers do little work on each value, so that on a GPU, and for tensors that no cache holds, their time is that of their bytes.
Counted are, of every operation that torch dispatches (on CPU: they are the same), the tensors that it reads and writes; of our
kernels, how often they read their input. The estimate is the ratio of a method's bytes to those of ``torch.clone``; it leaves out
launches, arithmetic, and what a cache saves. Writes ``gpu_bytes.csv`` into ``benchmarks/results``, and the table in
docs/results.md, where measured ratios of ``benchmarks.quantizer_gpu`` stand in brackets. Needs triton, but no GPU.
"""

import os
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import fusion
from benchmarks.quantizer import LABELS, column_head, methods
from benchmarks.readme import replace_table
from benchmarks.rows import FORMATS, read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "gpu-bytes: written by python -m benchmarks.gpu_bytes"
SHAPES = ((64, 64, 32, 32), (64, 256, 56, 56), (128, 64, 112, 112), (64, 2048, 7, 7))
NAMES = LABELS | {n: label for n, label in fusion.LABELS.items() if n.startswith(("norm", "sum"))}
FIELDS = ("shape", "memory_format", "method", "reads", "writes", "ratio_to_clone")


class BytesMoved(TorchDispatchMode):
    """Bytes that operations read and write; views and empty tensors move none."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.read += sum(map(_bytes, _distinct((args, kwargs))))
            self.written += sum(map(_bytes, _distinct(outputs)))
        return outputs


def _distinct(tree) -> list[torch.Tensor]:
    return list({id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}.values())


def _bytes(t: torch.Tensor) -> int:
    """An expanded tensor lies in memory once."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def moved(function: Callable, x: torch.Tensor) -> tuple[float, float]:
    """What a forward reads and writes, in tensors of x's size."""
    size = x.numel() * x.element_size()
    with torch.no_grad(), BytesMoved() as count:
        function(x)
    return count.read / size, count.written / size


def kernels_moved(x: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The same of our GPU kernels (scales left out), and of what is ahead of them as separate operations of torch."""
    from granq_plugin.kernels import triton_kernel
    from granq_plugin.kernels.layout import Ahead, layout_of
    reads, of_sum = (triton_kernel.reads(layout_of(x, 1), x.element_size(), loads) for loads in (1, 2))
    norm = Ahead(*torch.ones(4, x.shape[1]), 1e-5)
    found = dict(granq=(reads, 1), granq_static=(1, 1), norm_fused=(reads, 1), sum_fused=(2 * of_sum, 1))
    for name, ahead in (("norm_separate", norm), ("sum_separate", norm._replace(residual=x))):
        before = moved(ahead.apply, x)
        found[name] = before[0] + reads, before[1] + 1
    return found


def measure(shape: tuple[int, ...], memory_format: str) -> list[dict]:
    """Rows of all methods; the batch, of which ratios do not depend, is 2."""
    x = torch.randn(2, *shape[1:]).contiguous(memory_format=getattr(torch, memory_format))
    counts = {name: moved(f, x) for name, f in methods(shape[1]).items()} | kernels_moved(x)
    floor = sum(counts["clone"])
    return [dict(zip(FIELDS, ("x".join(map(str, shape)), memory_format, name, f"{counts[name][0]:.2f}", f"{counts[name][1]:.2f}",
                              f"{sum(counts[name]) / floor:.3f}"))) for name in NAMES if name in counts]


def table(rows: list[dict], measured: list[dict]) -> str:
    """Markdown: estimates, and in brackets what was measured as a CUDA graph."""
    columns = list(dict.fromkeys((r["shape"], r["memory_format"]) for r in rows))
    cell = {(r["method"], (r["shape"], r["memory_format"])): f"{float(r['ratio_to_clone']):.2f}" for r in rows}
    known = {(r["method"], (r["shape"], r["memory_format"])): f" ({float(r['ratio_to_clone']):.2f})" for r in measured
             if (r["mode"], r["launch"]) == ("forward", "graph") and r["method"] != "clone"}
    lines = ["| forward, bytes as multiples of `torch.clone`'s | " + " | ".join(
        column_head(*c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {NAMES[name]} | " + " | ".join(cell[name, c] + known.get((name, c), "") for c in columns) + " |"
              for name in dict.fromkeys(r["method"] for r in rows)]
    return "\n".join(lines)


def tables() -> str:
    """What stands in docs/results.md."""
    return table(read(RESULTS / "gpu_bytes.csv"), read(RESULTS / "quantizer_gpu.csv"))


@click.command(help=__doc__)
@click.option("--table-only", is_flag=True, help="Write the table of docs/results.md from the CSV files that are there.")
def main(table_only: bool) -> None:
    if not table_only:
        os.environ["GRANQ_KERNEL"] = "eager"  # torch's operations
        write(RESULTS / "gpu_bytes.csv", FIELDS, [r for f in FORMATS for shape in SHAPES for r in measure(shape, f)])
    replace_table(MARKER, tables())


if __name__ == "__main__":
    main()
