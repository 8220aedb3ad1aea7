"""``granq demo``."""

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from granq_plugin.cli.options import input_errors

__all__ = ["demo"]

_NEEDED = ("sklearn", "safetensors", "matplotlib", "jinja2", "tqdm", "onnx", "onnxscript", "onnxoptimizer", "onnxruntime", "qonnx")
_BAR = "{desc} {percentage:3.0f}% |{bar:30}| {elapsed}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", default="granq-demo", show_default=True,
              help="Folder for everything that the demo leaves: a new one, or that of the same demo, to go on or see it again.")
@click.option("--weight-bits", type=click.IntRange(2, 8), default=3, show_default=True, help="Bit width of the weights.")
@click.option("--act-bits", type=click.IntRange(2, 8), default=3, show_default=True, help="Bit width of the activations.")
def demo(out, weight_bits, act_bits) -> None:
    """Make a low-bit network without data, from end to end.

    It takes a few minutes, and nothing is downloaded. A float network for handwritten digits, which comes with the package, is
    quantized, trained on invented images, made ready for FPGAs, exported, run in other programs, and described in
    DIR/report.html.

    \b
    Example:
      granq demo --out granq-demo
    """
    missing = [name.replace("sklearn", "scikit-learn") for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"granq demo needs {', '.join(missing)}: pip install 'granq-plugin[demo]'")
    click.echo("granq demo: two to three minutes; an interrupted demo goes on when it is started again", err=True)
    import torch
    from tqdm import tqdm

    from zoo.demo import run_demo
    torch.set_num_threads(1)  # the networks are so small that threads would mostly wait for each other
    try:
        with contextlib.ExitStack() as bars, input_errors():
            def stage(words: str, total: int):
                bars.close()
                bar = tqdm(total=total, desc=f"{words:28}", bar_format=_BAR, file=sys.stderr, disable=None)
                if bar.disable:  # not a terminal
                    return _quarters(words, total)
                return bars.enter_context(bar).update
            report = run_demo(out, weight_bits, act_bits, stage=stage)
    except KeyboardInterrupt:
        click.echo("\nstopped: the same command goes on from here", err=True)
        raise
    click.echo(_summary(report, out))


def _quarters(words: str, total: int):
    """Progress as lines, for a log: the stage, then each quarter of it."""
    click.echo(words, err=True)
    done = 0

    def update(steps: int) -> None:
        nonlocal done
        before, done = done, done + steps
        if 4 * done // total > 4 * before // total:
            click.echo(f"{words}: {100 * done // total} %", err=True)
    return update


def _summary(report: dict, out: Path) -> str:
    from zoo.demo.pictures import LABELS
    lines = [f"\n{report['network']}, {report['test_images']} test images, which no training has seen"]
    for step in report["ladder"]:
        kept = "" if step["key"] == "float" else f"   {step['retention']:6.1%} of float"
        lines.append(f"  {LABELS[step['key']].format(bits=report['bits']):40} {step['top1']:6.2f} %{kept}")
    last = report["ladder"][-1]
    lines.append(f"  (95 % interval of the last one: {last['low']:.1f} to {last['high']:.1f} %; steps that differ by less are "
                 "not told apart)")
    for file in report["verification"]:
        for e in file["executors"]:
            lines.append(f"  {file['file'] + ' in ' + e['executor']:40} {100 * e['correct'] / e['images']:6.2f} %   "
                         f"as torch on {e['close']} of {e['images']} images")
    costs = report["costs"]
    kept = sum(r["passed"] for r in report["finn"])
    lines += [f"weights {costs['at_float32']['weight_bytes'] / 1000:.0f} kB -> {costs['network']['weight_bytes'] / 1000:.0f} kB; "
              f"{kept} of {len(report['finn'])} rules of FINN kept; {report['seconds']:.0f} s",
              f"report: {(out / 'report.html').absolute()}"]
    return "\n".join(lines)
