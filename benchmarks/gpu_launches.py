"""What does Python pay for a call of the GPU's kernels?

    python -m benchmarks.gpu_launches

At small batches a GPU waits for Python. Here a driver of Triton stands in for a GPU's: kernels are compiled for one, and launching
them does nothing, so that what is left of a call is Python's part (torch allocates on the CPU, which takes about as long).
"Triton's launch" is the same call where Triton looks for the compiled kernel each time, as it does in ``kernel[grid](...)``.
Medians of interleaved rounds. Writes ``gpu_launches.csv`` into ``benchmarks/results``, and the table in docs/results.md. Needs
triton, but no GPU.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "gpu-launches: written by python -m benchmarks.gpu_launches"
FIELDS = ("call", "launch", "median_us", "low_us", "high_us", "rounds")
SHAPE = (2, 4, 16, 16)
LAUNCHES = {"again": "µs", "triton": "µs, Triton's launch"}


class NoLaunches:
    """A driver of Triton for a GPU of compute capability 9.0 that launches nothing; ``launched`` is told the kernel, the grid and
    the arguments."""

    def __init__(self, launched: Callable[[tuple], object] = lambda call: None) -> None:
        from triton.backends.compiler import GPUTarget
        self._target, self._numbers, self.utils = GPUTarget("cuda", 90, 32), itertools.count(), self

        class Launcher:
            def __init__(self, source, metadata) -> None:
                pass

            def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
                launched((function, x, y, z, packed, *args))
        self.launcher_cls = Launcher

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict:
        from granq_plugin.kernels.triton_kernel import HOPPER
        return dict(max_shared_mem=HOPPER[1], max_num_regs=65536, multiprocessor_count=HOPPER[0])

    def load_binary(self, *binary) -> tuple[int, ...]:
        """Module, function (a number for each), registers, spills, threads."""
        return 1, next(self._numbers), 64, 0, 1024


def pretend(launched: Callable[[tuple], object] = lambda call: None) -> None:
    """From now on, this process takes CPU tensors for a GPU's: their results are never computed."""
    from triton.runtime import driver

    from granq_plugin import kernels
    from granq_plugin.kernels import triton_kernel
    driver.set_active(NoLaunches(launched))
    kernels._why_not_triton = lambda x: None
    triton_kernel._chip = lambda device: triton_kernel.HOPPER
    os.environ["GRANQ_KERNEL"] = "triton"


@contextmanager
def launching(call: Callable) -> Iterator[None]:
    """Within it, ``call(launch, *tensors)`` is what every launch of our kernels does."""
    from granq_plugin.kernels.triton_launch import Launch
    before, Launch.__call__ = Launch.__call__, call
    try:
        yield
    finally:
        Launch.__call__ = before


def calls() -> dict[str, Callable]:
    """What is timed, by what it is called in the table."""
    import brevitas.nn as qnn

    import granq_plugin as gq
    from granq_plugin import kernels
    from granq_plugin.kernels import Before
    x, leaf = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    scale, zero_point = torch.ones(2, SHAPE[1])
    layer = qnn.QuantReLU(gq.GranQActPerChannel, bit_width=4).eval()

    def in_layer() -> None:
        with torch.no_grad():
            layer(x)
    return {
        "torch.clone": lambda: x.clone(),
        "GranQ, dynamic": lambda: kernels.granq(x, 4),
        "ReLU, GranQ with gradient": lambda: kernels.granq(leaf, 4, 1, Before(relu=True)),
        "GranQ, static": lambda: kernels.affine_quantize(x, scale, zero_point, (0, 15)),
        "QuantReLU with GranQ": in_layer,
    }


def measure(rounds: int, repeats: int = 500) -> list[dict]:
    """Rows of all calls."""
    from granq_plugin.kernels.triton_launch import Launch
    ways, times = dict(again=Launch.__call__, triton=Launch.by_triton), {}
    for _ in range(rounds + 1):  # the first compiles
        for (name, call), (launch, how) in itertools.product(calls().items(), ways.items()):
            with launching(how):
                call()
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                times.setdefault((name, launch), []).append((time.perf_counter() - start) / repeats * 1e6)
    return [dict(zip(FIELDS, (*key, *(f"{v:.2f}" for v in (statistics.median(t[1:]), min(t[1:]), max(t[1:]))), rounds)))
            for key, t in times.items()]


def table(rows: list[dict]) -> str:
    """Markdown: a line per call."""
    cell = {(r["call"], r["launch"]): f"{float(r['median_us']):.1f}" for r in rows}
    lines = ["| Python's part of a call | " + " | ".join(LAUNCHES.values()) + " |", "|---" * (len(LAUNCHES) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell[name, launch] for launch in LAUNCHES) + " |"
              for name in dict.fromkeys(r["call"] for r in rows)]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True)
def main(rounds: int) -> None:
    pretend()
    rows = measure(rounds)
    write(RESULTS / "gpu_launches.csv", FIELDS, rows)
    replace_table(MARKER, table(read(RESULTS / "gpu_launches.csv")))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
