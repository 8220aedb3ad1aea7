"""What does the quantizer cost on a GPU, beside copying the tensor and beside its peers?

    python -m benchmarks.quantizer_gpu [--seconds 0.3] [--part shapes|scaling|memory]

The methods of ``benchmarks.quantizer`` in float32. Every call of a round meets another input, so that none lies in the cache. Two
ways of launching: from Python, as a network in eager mode does, and recorded as a CUDA graph, which leaves the work of the GPU
alone. All methods take turns, round after round, in one process; medians and quartiles by the GPU's clock. Writes
``quantizer_gpu*.csv`` into ``benchmarks/results``, and the table in docs/results.md.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.quantizer import LABELS, MODES, column_head, in_turns, methods
from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "quantizer-gpu: written by python -m benchmarks.quantizer_gpu"
SHAPES = (
    ((64, 64, 32, 32), "contiguous_format"), ((64, 64, 32, 32), "channels_last"), ((16, 256, 56, 56), "contiguous_format"),
    ((16, 256, 56, 56), "channels_last"), ((64, 256, 56, 56), "contiguous_format"), ((64, 256, 56, 56), "channels_last"),
    ((128, 64, 112, 112), "contiguous_format"), ((128, 64, 112, 112), "channels_last"), ((64, 1024, 14, 14), "contiguous_format"),
    ((64, 1024, 14, 14), "channels_last"), ((64, 2048, 7, 7), "contiguous_format"), ((64, 2048, 7, 7), "channels_last"),
    ((16, 16, 32, 32), "contiguous_format"))
LAUNCHES = ("graph", "eager")
PARTS = ("shapes", "scaling", "memory")
FIELDS = ("device", "shape", "memory_format", "mode", "launch", "method", "median_us", "low_us", "high_us", "ratio_to_clone",
          "gb_per_s", "rounds")
SCALING_FIELDS = ("device", "channels", "megabytes", "method", "ns_per_value", "rounds")
MEMORY_FIELDS = ("device", "shape", "mode", "method", "peak_extra_tensors")
CACHE_BYTES = 2**28  # more than any GPU's cache
SLOW = ("loop", )  # of very many launches: recorded, forward, and of up to _MOST_LOOPS channels
_MOST_LOOPS = 256
READS_BACK = ("fake_quantize", )  # values from the GPU, which no graph records


def inputs(shape: tuple[int, ...], memory_format: str) -> list:
    """As many as no cache holds, at least two."""
    import torch
    count = max(2, -(-CACHE_BYTES // (4 * math.prod(shape))))
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cuda").contiguous(memory_format=getattr(torch, memory_format))
            for _ in range(count)]


def caller(quantizer: Callable, tensors: list, mode: str) -> Callable[[], None]:
    """Calls the quantizer on every tensor."""
    import torch
    if mode == "forward":
        def run() -> None:
            with torch.no_grad():
                for x in tensors:
                    quantizer(x)
        return run
    leaves, grad = [x.detach().requires_grad_() for x in tensors], tensors[-1]

    def run_both() -> None:
        for x in leaves:
            torch.autograd.grad(quantizer(x), x, grad)
    return run_both


def recorded(run: Callable[[], None], pool: tuple | None = None) -> Callable[[], None]:
    """``run`` as a CUDA graph. Graphs of one pool share their memory, which is right for runs that nobody wants the results of."""
    from granq_plugin.zero_shot.graphs import RecordedStep
    step = RecordedStep(run, warm_up=1, pool=pool)
    step()
    step()
    return step


def gpu_clock(f: Callable) -> float:
    """Milliseconds of a call on the GPU."""
    from torch import cuda
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def functions_of(quantizers: dict[str, Callable], tensors: list, mode: str, launch: str) -> dict[str, Callable]:
    left_out = SLOW if launch == "eager" else READS_BACK
    if mode != "forward" or tensors[0].shape[1] > _MOST_LOOPS:
        left_out += SLOW
    runs = {name: caller(q, tensors, mode) for name, q in quantizers.items() if name not in left_out}
    if launch == "eager":
        return runs
    from torch.cuda import graph_pool_handle
    pool = graph_pool_handle()
    return {name: recorded(run, pool) for name, run in runs.items()}


def measure_shapes(seconds: float, device: str) -> None:
    """Writes after every mode of a shape: time on a GPU can end at any moment."""
    from torch import cuda
    rows = []
    for shape, memory_format in SHAPES:
        tensors = inputs(shape, memory_format)
        for mode in MODES:
            for launch in LAUNCHES:
                functions = functions_of(methods(shape[1], "cuda"), tensors, mode, launch)
                times = {name: [1000 * t / len(tensors) for t in of_method]
                         for name, of_method in in_turns(functions, seconds, clock=gpu_clock).items()}
                floor = statistics.median(times["clone"])
                for method, of_method in times.items():
                    low, median, high = statistics.quantiles(of_method, n=4)
                    rows.append(dict(zip(FIELDS, (
                        device, "x".join(map(str, shape)), memory_format, mode, launch, method, f"{median:.2f}", f"{low:.2f}",
                        f"{high:.2f}", f"{median / floor:.3f}", f"{8 * math.prod(shape) / median / 1e3:.1f}", len(of_method)))))
                click.echo(f"{shape} {memory_format} {mode} {launch}, clone {floor:.1f} us: " + ", ".join(
                    f"{r['method']} {r['ratio_to_clone']}" for r in rows[-len(times):]))
                del functions
                cuda.empty_cache()
            write(RESULTS / "quantizer_gpu.csv", FIELDS, rows)


def measure_scaling(seconds: float, device: str) -> list[dict]:
    """Nanoseconds per value against C at 64 MB; all points take turns."""
    functions, count = {}, 0
    for channels in (16, 32, 64, 128, 256, 512, 1024, 2048):
        tensors = inputs((64, channels, 2**14 // channels, 16), "contiguous_format")
        count = len(tensors)
        quantizers = {n: q for n, q in methods(channels, "cuda").items() if n in ("clone", "granq")}
        functions |= {(channels, n): f for n, f in functions_of(quantizers, tensors, "forward", "graph").items()}
    return [dict(device=device, channels=channels, megabytes=64, method=method, rounds=len(of_method),
                 ns_per_value=f"{1e6 * statistics.median(of_method) / count / 2**24:.5f}")
            for (channels, method), of_method in in_turns(functions, seconds * 4, clock=gpu_clock).items()]


def measure_memory(device: str) -> list[dict]:
    """Most memory allocated at a time, the result included, in tensors of the input's size."""
    import torch
    rows, shape = [], SHAPES[0][0]
    for mode in MODES:
        for method, quantizer in methods(shape[1], "cuda").items():
            run = caller(quantizer, inputs(shape, "contiguous_format")[:1], mode)
            run()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            rows.append(dict(device=device, shape="x".join(map(str, shape)), mode=mode, method=method, peak_extra_tensors=
                             f"{(torch.cuda.max_memory_allocated() - before) / (4 * math.prod(shape)):.3f}"))
    return rows


def table(rows: list[dict], scaling: list[dict], memory: list[dict]) -> str:
    """Markdown: times as multiples of torch.clone's, in graphs and from Python; what was not measured is left out."""
    def size(row: dict) -> int:
        return math.prod(map(int, row["shape"].split("x")))

    shapes = list(dict.fromkeys((r["shape"], r["memory_format"]) for r in rows if size(r) >= 2**22))
    cell = {(r["shape"], r["memory_format"], r["mode"], r["launch"], r["method"]): r for r in rows}
    names = list(dict.fromkeys(r["method"] for r in rows))

    def value(method, *key) -> str:
        r = cell.get((*key, method))
        if r is None:
            return ""
        return f"{float(r['median_us']):.0f} µs" if method == "clone" else f"{float(r['ratio_to_clone']):.2f}"

    lines = [f"{rows[0]['device']}, float32, 4 bits, recorded as CUDA graphs; times as multiples of `torch.clone`'s (its "
             "microseconds in the first row; cl: channels_last).", "",
             "| forward | " + " | ".join(column_head(*s) for s in shapes)
             + (" | peak memory, tensors |" if memory else " |"), "|---" * (len(shapes) + 1 + bool(memory)) + "|"]
    peaks = {r["method"]: f" {float(r['peak_extra_tensors']):.2f} |" for r in memory if r["mode"] == "forward"}
    for method in names:
        lines.append(f"| {LABELS[method]} | " + " | ".join(value(method, *s, "forward", "graph") for s in shapes)
                     + " |" + peaks.get(method, ""))
    largest = max(rows, key=size)
    big = largest["shape"], largest["memory_format"]
    ways = [(m, w) for m in MODES for w in LAUNCHES if (*big, m, w, "clone") in cell]
    if len(ways) > 1:
        names_of = {"graph": "graph", "eager": "from Python"}
        lines += ["", f"Other ways, [{big[0].replace('x', ', ')}]:", "",
                  "| | " + " | ".join(f"{m}, {names_of[w]}" for m, w in ways) + " |", "|---" * (len(ways) + 1) + "|"]
        lines += [f"| {LABELS[method]} | " + " | ".join(value(method, *big, *way) for way in ways) + " |" for method in names]
    if not scaling:
        return "\n".join(lines)
    granq, clone = ([float(r["ns_per_value"]) for r in scaling if r["method"] == m] for m in ("granq", "clone"))
    lines += ["", f"GranQ's cost per value from C = 16 to C = 2048 at 64 MB: {min(granq):.4f} to {max(granq):.4f} ns (largest / "
              f"smallest {max(granq) / min(granq):.2f}; `torch.clone`: {max(clone) / min(clone):.2f})."]
    return "\n".join(lines)


def read_rows(name: str) -> list[dict]:
    return read(RESULTS / name)


def tables() -> str:
    """What stands in docs/results.md."""
    return table(*map(read_rows, ("quantizer_gpu.csv", "quantizer_gpu_scaling.csv", "quantizer_gpu_memory.csv")))


@click.command(help=__doc__)
@click.option("--seconds", type=click.FloatRange(min=0.01), default=0.3, show_default=True, help="for each shape, mode and launch")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, show_default=True)
@click.option("--table-only", is_flag=True, help="Write the table of docs/results.md from the CSV files that are there.")
def main(seconds: float, parts: tuple[str, ...], table_only: bool) -> None:
    if table_only:
        return replace_table(MARKER, tables())
    import torch
    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no GPU here; python -m benchmarks.quantizer measures on the CPU")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    if "scaling" in parts:
        write(RESULTS / "quantizer_gpu_scaling.csv", SCALING_FIELDS, measure_scaling(seconds, device))
    if "memory" in parts:
        write(RESULTS / "quantizer_gpu_memory.csv", MEMORY_FIELDS, measure_memory(device))
    if "shapes" in parts:
        measure_shapes(seconds, device)
    replace_table(MARKER, tables())


if __name__ == "__main__":
    main()
