"""What does the quantizer cost, beside copying the tensor and beside its peers?

    python -m benchmarks.quantizer [--threads 2] [--part fresh|shapes|memory|scaling]

Forward, and forward with backward, of 4-bit activation quantizers on the activations of ResNet-20, -18, -50 and MobileNetV2, in
float32 on CPU. All methods take turns, round after round, in one process; medians and quartiles, each also as a ratio to
``torch.clone`` in the same rounds, and as bytes (the tensor read once and written once) per second beside a measured copy. Freed
memory is kept and used again, so that methods are compared and not page faults; glibc's defaults, which return large buffers to the
system, are measured beside it for GranQ and the copy. Writes ``quantizer*.csv`` and ``.png`` into ``benchmarks/results``, and the
table in the README.
"""

import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from benchmarks.readme import replace_table
from benchmarks.rows import read, write
from granq_plugin.atomic import atomic_path

RESULTS = Path(__file__).parent / "results"
MARKER = "quantizer: written by python -m benchmarks.quantizer"
BITS = 4
SHAPES = (
    ("issue", (64, 64, 32, 32)), ("ResNet-50", (16, 256, 56, 56)),
    ("ResNet-20", (16, 16, 32, 32)), ("ResNet-20", (200, 16, 32, 32)), ("ResNet-20", (200, 64, 8, 8)),
    ("ResNet-18", (16, 64, 56, 56)), ("ResNet-18", (16, 512, 7, 7)), ("ResNet-50", (4, 2048, 7, 7)),
    ("MobileNetV2", (4, 96, 112, 112)), ("MobileNetV2", (16, 960, 7, 7)))
HEADLINE = ((64, 64, 32, 32), (16, 256, 56, 56))
PARTS = ("fresh", "shapes", "memory", "scaling")
MODES = ("forward", "forward+backward")
FIELDS = ("threads", "network", "shape", "mode", "method", "median_ms", "low_ms", "high_ms", "ratio_to_clone", "gb_per_s",
          "copy_gb_per_s", "rounds")
SCALING_FIELDS = ("threads", "sweep", "channels", "megabytes", "method", "ns_per_value", "rounds")
FRESH_FIELDS = ("threads", "shape", "method", "median_ms", "rounds")
MEMORY_FIELDS = ("shape", "mode", "method", "peak_extra_tensors")
LABELS = {
    "clone": "torch.clone", "granq": "GranQ, dynamic", "granq_static": "GranQ, static", "granq_eager": "GranQ, torch operations",
    "published": "published formula, eager", "brevitas_per_tensor": "Brevitas, dynamic, per tensor",
    "brevitas_per_channel": "Brevitas, stock blocks per sample and channel",
    "fake_quantize": "torch.fake_quantize_per_channel_affine",
    "torchao": "torchao, dynamic fake quantization", "loop": "Python loop over channels"}


def keep_memory(keep: bool) -> None:
    """Whether glibc keeps freed buffers for the next one, of any size, or maps each large one from the system."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt, (mmap_max, mmap_threshold, trim_threshold) = ctypes.CDLL(None).mallopt, (-4, -3, -1)  # malloc.h
    mallopt(mmap_max, 0 if keep else 2**16)
    mallopt(trim_threshold, 2**31 - 1 if keep else 2**17)
    if not keep:
        mallopt(mmap_threshold, 2**17)


def methods(channels: int, device: str = "cpu") -> dict[str, Callable]:
    """The quantizers by name: each takes and returns ``[B, C, H, W]``, on the device."""
    import brevitas.nn as qnn
    import torch
    from brevitas.core.function_wrapper.shape import OverBatchOverOutputChannelView
    from brevitas_examples.common.generative.quantizers import ShiftedUint8DynamicActPerTensorFloat

    import granq_plugin as gq
    from benchmarks.published_loop import printed_formula
    from granq_plugin import functional as GF

    def rows(x):
        return x.reshape(x.shape[0] * x.shape[1], -1)

    def fake_quantize(x):
        lo, hi = GF.channel_range(x)
        scale, zero_point = GF.affine_params(lo, hi, BITS)
        return torch.fake_quantize_per_channel_affine(
            rows(x), scale.flatten(), zero_point.flatten().to(torch.int32), 0, 0, 2**BITS - 1).view_as(x)

    def loop(x):
        return torch.stack([printed_formula(x[:, c:c + 1], BITS) for c in range(x.shape[1])], 1).view_as(x)

    def per_channel(x, shape):
        return x.view(*x.shape[:2], 1, 1)

    def layer(act_quant):
        return qnn.QuantIdentity(act_quant, bit_width=BITS).to(device)

    static = layer(gq.GranQActPerChannelStatic)
    static(torch.randn(2, channels, 4, 4, device=device))
    static.act_quant.fused_activation_quant_proxy.tensor_quant.init_scale()
    found = dict(
        clone=torch.clone, granq=layer(gq.GranQActPerChannel), granq_static=static.eval(),
        granq_eager=lambda x: GF.granq(x, BITS).value, published=lambda x: printed_formula(x, BITS),
        brevitas_per_tensor=layer(ShiftedUint8DynamicActPerTensorFloat),
        brevitas_per_channel=layer(ShiftedUint8DynamicActPerTensorFloat.let(
            scaling_stats_input_view_shape_impl=OverBatchOverOutputChannelView, dynamic_scaling_broadcastable_fn=per_channel,
            scaling_stats_permute_dims=None, stats_reduce_dim=2)),
        fake_quantize=fake_quantize, loop=loop)
    try:
        from torchao.quantization.quant_primitives import MappingType, _fake_quantize_affine, choose_qparams_affine
    except ImportError:
        click.echo("torchao is not installed: left out")
    else:
        def torchao(x):
            block = (1, 1, *x.shape[2:])
            scale, zero_point = choose_qparams_affine(
                x.detach(), MappingType.ASYMMETRIC, block, torch.uint8, 0, 2**BITS - 1, zero_point_dtype=torch.int32)
            return _fake_quantize_affine(x, block, scale, zero_point, torch.uint8, 0, 2**BITS - 1)
        found["torchao"] = torchao
    return found


def column_head(shape: str, memory_format: str) -> str:
    """Of a table, for a shape as CSV files write it."""
    return f"[{shape.replace('x', ', ')}]{' cl' if memory_format == 'channels_last' else ''}"


def wall_clock(f: Callable) -> float:
    """Milliseconds of a call."""
    begin = time.perf_counter()
    f()
    return 1000 * (time.perf_counter() - begin)


def in_turns(functions: dict[str, Callable], seconds: float, least: int = 5,
             clock: Callable[[Callable], float] = wall_clock) -> dict[str, list[float]]:
    """Milliseconds of each function, round after round; what would keep the others from 20 rounds runs in ``least`` alone."""
    for f in functions.values():
        f()
    times, rounds = {name: [] for name in functions}, 0
    start = time.perf_counter()
    while rounds < least or time.perf_counter() - start < seconds:
        rounds += 1
        for name, f in functions.items():
            if len(times[name]) >= least and statistics.median(times[name]) > 1000 * seconds / len(functions) / 20:
                continue
            times[name].append(clock(f))
    return times


def callers(quantizers: dict[str, Callable], shape: tuple, mode: str) -> dict[str, Callable]:
    """Functions without arguments that run one forward, or one forward and backward."""
    import torch
    x = torch.randn(shape)
    if mode == "forward":
        return {name: lambda q=q: _without_grad(q, x) for name, q in quantizers.items()}
    leaf, grad = x.requires_grad_(), torch.randn(shape)
    return {name: lambda q=q: torch.autograd.grad(q(leaf), leaf, grad) for name, q in quantizers.items()}


def _without_grad(quantizer, x):
    import torch
    with torch.no_grad():
        return quantizer(x)


def copy_bandwidth() -> float:
    """GB/s (read and written) of copying 64 MB between buffers that exist."""
    import torch
    a, b = torch.randn(2, 2**24)
    times = in_turns(dict(clone=lambda: b.copy_(a)), 0.5)["clone"]
    return 2 * 4 * 2**24 / statistics.median(times) / 1e6


def measure_shapes(seconds: float, shapes: Iterable = SHAPES) -> list[dict]:
    import torch
    rows, bandwidth = [], copy_bandwidth()
    for network, shape in shapes:
        for mode in MODES:
            times = in_turns(callers(methods(shape[1]), shape, mode), seconds)
            floor = statistics.median(times["clone"])
            for method, of_method in times.items():
                low, median, high = statistics.quantiles(of_method, n=4)
                rows.append(dict(
                    threads=torch.get_num_threads(), network=network, shape="x".join(map(str, shape)), mode=mode, method=method,
                    median_ms=f"{median:.4f}", low_ms=f"{low:.4f}", high_ms=f"{high:.4f}", ratio_to_clone=f"{median / floor:.3f}",
                    gb_per_s=f"{8 * math.prod(shape) / median / 1e6:.2f}", copy_gb_per_s=f"{bandwidth:.2f}", rounds=len(of_method)))
            click.echo(f"{network} {shape} {mode}: " + ", ".join(
                f"{r['method']} {r['ratio_to_clone']}" for r in rows[-len(times):]))
    return rows


def measure_scaling(seconds: float) -> list[dict]:
    """Nanoseconds per value against C at 16 MB, and against the size at C = 64; all points of a sweep take turns."""
    import torch
    sweeps = {"channels": [(16, c, 2**14 // c, 16) for c in (16, 32, 64, 128, 256, 512, 1024, 2048)],
              "bytes": [(n, 64, 32, 32) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]}
    rows = []
    for sweep, shapes in sweeps.items():
        functions = {}
        for shape in shapes:
            quantizers = {n: q for n, q in methods(shape[1]).items() if n in ("clone", "granq", "granq_eager", "published")}
            functions |= {(shape, method): f for method, f in callers(quantizers, shape, "forward").items()}
        for (shape, method), of_method in in_turns(functions, seconds * len(shapes)).items():
            rows.append(dict(
                threads=torch.get_num_threads(), sweep=sweep, channels=shape[1], megabytes=f"{4 * math.prod(shape) / 2**20:g}",
                method=method, ns_per_value=f"{1e6 * statistics.median(of_method) / math.prod(shape):.4f}", rounds=len(of_method)))
    return rows


def measure_fresh(seconds: float) -> list[dict]:
    """The forward of GranQ and the copy where each result lies on pages that the system must clear first."""
    import torch
    rows = []
    for shape in HEADLINE:
        functions = callers(methods(shape[1]), shape, "forward")
        times = in_turns({name: functions[name] for name in ("clone", "granq")}, seconds)
        rows += [dict(threads=torch.get_num_threads(), shape="x".join(map(str, shape)), method=method, rounds=len(of_method),
                      median_ms=f"{statistics.median(of_method):.4f}") for method, of_method in times.items()]
    return rows


def measure_memory() -> list[dict]:
    """Most memory allocated at a time, the result included, in tensors of the input's size."""
    from torch.profiler import ProfilerActivity, profile
    rows, shape = [], HEADLINE[0]
    for mode in MODES:
        for method, f in callers(methods(shape[1]), shape, mode).items():
            f()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
                f()
            events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
            held = peak = 0
            for e in sorted(events, key=lambda e: e.start_ns()):
                held += e.nbytes()
                peak = max(peak, held)
            rows.append(dict(shape="x".join(map(str, shape)), mode=mode, method=method,
                             peak_extra_tensors=f"{peak / (4 * math.prod(shape)):.3f}"))
    return rows


def table(rows: list[dict], scaling: list[dict], memory: list[dict], fresh: list[dict]) -> str:
    """Markdown: times as multiples of torch.clone's."""
    shapes = ["x".join(map(str, s)) for s in HEADLINE]
    cell = {(r["shape"], r["mode"], r["method"]): r for r in rows}
    lines = [f"CPU, {rows[0]['threads']} threads, float32, {BITS} bits; times as multiples of `torch.clone`'s (its milliseconds in "
             f"the first row). Freed memory is kept and used again. A copy between existing buffers: "
             f"{float(rows[0]['copy_gb_per_s']):.1f} GB/s.", "",
             "| | " + " | ".join(f"[{s.replace('x', ', ')}] {m}" for s in shapes for m in MODES) + " | peak memory, tensors |",
             "|---|" + "---|" * (len(shapes) * len(MODES) + 1)]
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = [f"{float(cell[s, m, method]['median_ms']):.2f} ms" if method == "clone" else
                 f"{float(cell[s, m, method]['ratio_to_clone']):.2f}" for s in shapes for m in MODES]
        peak = next(r for r in memory if r["method"] == method and r["mode"] == "forward")["peak_extra_tensors"]
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} | {float(peak):.2f} |")
    granq, clone = ([float(r["ns_per_value"]) for r in scaling if r["sweep"] == "channels" and r["method"] == m]
                    for m in ("granq", "clone"))
    ratios = [g / c for g, c in zip(granq, clone)]
    ms = {(r["shape"], r["method"]): float(r["median_ms"]) for r in fresh}
    fresh_ratios = [f"{ms[s, 'granq'] / ms[s, 'clone']:.2f} ({ms[s, 'clone']:.2f} ms)" for s in shapes]
    lines += ["", "Where every result lies on fresh pages of the system instead, dynamic GranQ's forward takes "
              f"{' and '.join(fresh_ratios)} times the copy's time (in brackets).", "",
              f"GranQ's cost per value from C = 16 to C = 2048 at 16 MB, all in turns: {min(granq):.3f} to {max(granq):.3f} ns "
              f"(largest / smallest {max(granq) / min(granq):.2f}; `torch.clone` on the same tensors: "
              f"{max(clone) / min(clone):.2f}), {min(ratios):.2f} to {max(ratios):.2f} times the copy's at the same C."]
    return "\n".join(lines)


def plot_shapes(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shapes = ["x".join(map(str, s)) for s in HEADLINE]
    names = list(dict.fromkeys(r["method"] for r in rows))
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for ax, shape in zip(axes, shapes):
        for i, (mode, hatch, shade) in enumerate(zip(MODES, ("", "///"), ("0.35", "0.8"))):
            of = {r["method"]: float(r["ratio_to_clone"]) for r in rows if (r["shape"], r["mode"]) == (shape, mode)}
            places = [j + 0.4 * i - 0.2 for j in range(len(names))]
            ax.barh(places, [of[n] for n in names], 0.38, color=shade, hatch=hatch, edgecolor="black", label=mode)
            for place, name in zip(places, names):
                ax.text(of[name] * 1.05, place, f"{of[name]:.1f}", va="center", fontsize=8)
        ax.set_xscale("log")
        ax.set_xlim(0.5, 4 * max(float(r["ratio_to_clone"]) for r in rows if r["shape"] in shapes))
        ax.set_title(f"[{shape.replace('x', ', ')}]")
        ax.set_xlabel("time / time of torch.clone (log scale)")
    axes[0].set_yticks(range(len(names)), [LABELS[n] for n in names])
    axes[0].invert_yaxis()
    axes[1].legend(loc="upper right")  # where the bars of GranQ and the copy are short
    fig.tight_layout()
    fig.savefig(path, dpi=120, format="png")
    plt.close(fig)


def plot_scaling(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for ax, (sweep, at, label) in zip(axes, (("channels", "channels", "channels C, at 16 MB"),
                                             ("bytes", "megabytes", "size in MB, at C = 64"))):
        for method, style in zip(("clone", "granq", "granq_eager", "published"), ("k:o", "k-s", "k--^", "k-.x")):
            points = [r for r in rows if r["sweep"] == sweep and r["method"] == method]
            ax.plot([float(r[at]) for r in points], [float(r["ns_per_value"]) for r in points], style, label=LABELS[method])
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(label)
    axes[0].set_ylabel("forward, ns per value")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=4)
    fig.tight_layout(rect=(0, 0, 1, 0.92))
    fig.savefig(path, dpi=120, format="png")
    plt.close(fig)


def read_rows(name: str) -> list[dict]:
    return read(RESULTS / name)


@click.command(help=__doc__)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=3.0, show_default=True, help="for each shape and mode, at least")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True,
              default=PARTS, show_default=True, help="leaves the other parts' results as they are")
def main(threads: int, seconds: float, parts: tuple[str, ...]) -> None:
    import torch
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    RESULTS.mkdir(exist_ok=True)
    if "fresh" in parts:  # first: later there are freed buffers to use again
        keep_memory(False)
        write(RESULTS / "quantizer_fresh.csv", FRESH_FIELDS, measure_fresh(seconds))
    keep_memory(True)
    if "shapes" in parts:
        write(RESULTS / "quantizer.csv", FIELDS, measure_shapes(seconds))
    if "memory" in parts:
        write(RESULTS / "quantizer_memory.csv", MEMORY_FIELDS, measure_memory())
    if "scaling" in parts:
        write(RESULTS / "quantizer_scaling.csv", SCALING_FIELDS, measure_scaling(seconds / 3))
    files = [f"quantizer{name}.csv" for name in ("", "_scaling", "_memory", "_fresh")]
    missing = [p for p in files if not (RESULTS / p).exists()]
    if missing:
        raise click.ClickException(f"the table needs all parts, and these were never measured: {', '.join(missing)}")
    rows, scaling, memory, fresh = map(read_rows, files)
    with atomic_path(RESULTS / "quantizer.png") as part:
        plot_shapes(rows, part)
    with atomic_path(RESULTS / "quantizer_scaling.png") as part:
        plot_scaling(scaling, part)
    replace_table(MARKER, table(rows, scaling, memory, fresh))


if __name__ == "__main__":
    main()
