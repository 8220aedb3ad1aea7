"""What do the GPU's kernels consist of?

    python -m benchmarks.gpu_code

The kernels that tensors of the benchmark's shapes would be quantized by, compiled for compute capability 9.0 with a driver that
launches nothing (:mod:`benchmarks.gpu_launches`) and disassembled: registers of a thread, what it spills, shared memory of a
program, threads that a multiprocessor has room for, and instructions for each value. Those of both ways to a grid are counted, of
which a program takes one (triton_math._quantize). Writes ``gpu_code.csv`` into ``benchmarks/results``, and the table in
docs/results.md. Needs triton, but no GPU.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import click
import torch

from benchmarks.gpu_launches import launching, pretend
from benchmarks.quantizer import column_head
from benchmarks.readme import replace_table
from benchmarks.rows import FORMATS, read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "gpu-code: written by python -m benchmarks.gpu_code"
SHAPES = ((64, 64, 32, 32), (64, 256, 56, 56), (128, 64, 112, 112), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7))
FIELDS = ("shape", "memory_format", "kernel", "registers", "spilled_bytes", "shared_bytes", "threads", "resident_threads",
          "values", "instructions", "per_value")
REGISTERS, SHARED, THREADS = 65536, 233472, 2048  # of a multiprocessor


def compiled_for(shape: tuple[int, ...], memory_format: str) -> list[tuple]:
    """Launches of the dynamic quantizer with a ReLU, without gradients, and their compiled kernels; two where rows are shared by
    programs, of which a GPU measures which one is faster. After :func:`pretend`."""
    from granq_plugin import kernels
    from granq_plugin.kernels import Before, triton_launch
    x = torch.empty(2, *shape[1:], memory_format=getattr(torch, memory_format))
    kept = []

    def all_of(self, *tensors: torch.Tensor) -> None:
        for launch in self.launches:
            launch(*tensors)
    with (torch.no_grad(), mock.patch.object(triton_launch.Fastest, "__call__", all_of),
          launching(lambda launch, *tensors: kept.append((launch, launch.by_triton(*tensors))))):
        kernels.granq(x, 4, 1, Before(relu=True))
    return kept


def measure(shape: tuple[int, ...], memory_format: str) -> list[dict]:
    """Rows; registers as the hardware gives them out, 8 at a time."""
    return [_row(shape, memory_format, *found) for found in compiled_for(shape, memory_format)]


def _row(shape: tuple[int, ...], memory_format: str, launch, compiled) -> dict:
    constants, n = launch.constants, shape[2] * shape[3]
    blocks = [constants.get(name, 0) for name in ("BLOCK", "SECOND", "THIRD")]
    values = constants["ROWS"] * min(n, sum(blocks))
    registers, spilled, instructions = disassembled(compiled.asm["cubin"])
    threads = 32 * constants["num_warps"]
    shared = compiled.metadata.shared
    programs = min(REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads, SHARED // (shared + 1024), 32)
    return dict(zip(FIELDS, (
        "x".join(map(str, shape)), memory_format, launch.kernel.fn.__name__.removeprefix("_"), registers, spilled, shared, threads,
        threads * programs, values, instructions, f"{instructions * threads / values:.1f}")))


def disassembled(cubin: bytes) -> tuple[int, int, int]:
    """Registers, spilled bytes, and instructions, by the tools that come with Triton."""
    import triton
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (subprocess.run([tools / tool, option, file.name], check=True, capture_output=True, text=True).stdout
                       for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"^\s+(?:/\*\w+\*/)?\s*(?:@!?U?P\w+ )?(?!NOP)[A-Z][A-Z0-9_.]+ ?.*;", code, re.M))


def table(rows: list[dict]) -> str:
    """Markdown: a line for each shape and memory format."""
    lines = ["| tensor | kernel | instructions for a value | registers | spilled bytes | shared memory, kB | threads with room |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {column_head(r['shape'], r['memory_format'])} | {r['kernel']} | {r['per_value']} | {r['registers']} | "
              f"{r['spilled_bytes']} | {int(r['shared_bytes']) / 1000:.0f} | {r['resident_threads']} |" for r in rows]
    return "\n".join(lines)


@click.command(help=__doc__)
def main() -> None:
    pretend()
    write(RESULTS / "gpu_code.csv", FIELDS, [r for f in FORMATS for s in SHAPES for r in measure(s, f)])
    text = table(read(RESULTS / "gpu_code.csv"))
    replace_table(MARKER, text)
    click.echo(text)


if __name__ == "__main__":
    main()
