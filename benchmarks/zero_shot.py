"""How accurate is zero-shot QAT? Collects finished runs of ``granq qat --data`` into one table, with their logs.

    python -m benchmarks.zero_shot RUN_DIR... [--data DIR --weights FILE] [--stopped RUN_DIR]

Runs that were trained without ``--data``, on another machine, say, are evaluated first, and their teacher with ``--weights``.
Rows of earlier runs stay unless a new one has the name of their log. A run that was stopped because it went wrong has no row; its
log is kept, and its curve drawn.
Writes ``benchmarks/results/zero_shot.csv``, a log per run in ``benchmarks/results/zero_shot/``, the table in docs/results.md, and
``zero_shot.png``: accuracy against iterations, of the runs that were evaluated along the way (``--evaluate-every``). Every number
is of the last epoch, on the whole test set.
"""

import itertools
import json
import shutil
from pathlib import Path

import click

from benchmarks.readme import replace_table
from benchmarks.rows import read, write
from granq_plugin.atomic import atomic_path

RESULTS = Path(__file__).parent / "results"
LOGS = RESULTS / "zero_shot"
MARKER = "zero_shot: written by python -m benchmarks.zero_shot"
STOPPED = "_stopped.csv"
FIELDS = ("network", "weights", "activations", "bits", "float_top1", "top1", "test_images", "iterations", "batch_size",
          "images", "teacher_weights_sha256", "log")


def row_of(run_dir: Path) -> dict:
    """One line of the table. Raises a ValueError for a run that was not evaluated."""
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    if "top1" not in run:
        raise ValueError(f"run {str(run_dir)!r} was not evaluated: give granq qat --data")
    from granq_plugin.zero_shot import ZeroShotConfig
    config = ZeroShotConfig.from_file(run_dir / "config.toml")
    weights, acts = run["weight_bit_width"], run["act_bit_width"]
    return dict(
        network=run["network"], weights=run["weight_regime"] + (", mse ranges" if run["weight_range_mode"] == "mse" else ""),
        activations=run["activations"] + (", learned scales" if run["learned_scale"] else "") + (
            ", mse ranges" if run.get("act_range_mode") == "mse" else ""), bits=f"W{weights}A{acts}",
        float_top1=f"{run['float_top1']:.2f}", top1=f"{run['top1']:.2f}",
        test_images=run["test_images"], iterations=config.total_iterations, batch_size=config.batch_size,
        images="another run's" if run["images_sha256"] else "its generator's",
        teacher_weights_sha256=run["teacher_weights_sha256"], log=f"{run_dir.name}.csv")


def evaluate_run(run_dir: Path, data: Path, weights: Path) -> None:
    """Add what ``granq qat --data`` would have added to the ``run.json`` and ``metrics.csv`` of a run that was not evaluated.

    Raises:
        ValueError: for weights of another teacher.
    """
    import zoo.data
    from granq_plugin.zero_shot.run_directory import add_to_run
    from zoo.evaluate import default_batch_size, evaluate
    from zoo.registry import teacher_of
    from zoo.students import load_run
    student, network, run = load_run(run_dir)
    if "top1" in run:
        return
    teacher, _ = teacher_of(student.card, weights)
    own = network.state_dict()  # a student keeps its teacher's BatchNorm statistics, unless they are folded
    if any(name in own and not own[name].equal(value) for name, value in teacher.state_dict().items() if ".running_" in name):
        raise ValueError(f"run {str(run_dir)!r} had another teacher than that of {str(weights)!r}")
    test_set, preprocessing = zoo.data.load_images(data, student.card.dataset, card=student.card), student.card.preprocessing
    float_top1, top1 = (
        evaluate(n, test_set, preprocessing, default_batch_size(preprocessing)).top1 for n in (teacher, network))
    metrics = read(run_dir / "metrics.csv")
    metrics[-1]["accuracy"] = top1
    write(run_dir / "metrics.csv", list(metrics[-1]), metrics)
    add_to_run(run_dir, dict(test_images=len(test_set), float_top1=float_top1, top1=top1))


def table(rows: list[dict]) -> str:
    """Markdown: a block per network and teacher, the teacher named above it."""
    lines = []
    for network, teacher in dict.fromkeys((r["network"], r["teacher_weights_sha256"]) for r in rows):
        of_network = [r for r in rows if (r["network"], r["teacher_weights_sha256"]) == (network, teacher)]
        first = of_network[0]
        lines += [
            f"{network}, {first['test_images']} test images. Full precision: {first['float_top1']} % (weights SHA-256 "
            f"`{first['teacher_weights_sha256'][:12]}`…).", "",
            "| weights | activations | bits | top-1 % | retention | iterations x batch | images |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {r['weights']} | {r['activations']} | {r['bits']} | {r['top1']} | "
                  f"{float(r['top1']) / float(r['float_top1']):.3f} | "
                  f"{r['iterations']} x {r['batch_size']} | [{r['images']}](../benchmarks/results/zero_shot/{r['log']}) |"
                  for r in of_network]
        lines.append("")
    return "\n".join(lines).rstrip()


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against iterations, a line per run with more than two evaluations."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    shown = {f"{r['network']}, {r['bits']}, {r['weights']}, {r['activations']}: {r['iterations']} x {r['batch_size']}": r["log"]
             for r in rows if len(accuracies(r["log"])) > 2}
    shown |= {log.stem.replace("_", " "): log.name for log in sorted(LOGS.glob(f"*{STOPPED}"))}
    for (label, log), marker, line in zip(shown.items(), "osD^vPX*", itertools.cycle(("-", "--", ":"))):
        axis.plot(*zip(*accuracies(log)), marker=marker, markersize=4, linewidth=1.2, color="black", linestyle=line, label=label)
    axis.set(xscale="log", xlabel="iterations (log scale)", ylabel="test top-1, %",
             title="Zero-shot QAT: accuracy against iterations")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)


def accuracies(log: str) -> list[tuple[int, float]]:
    """``(iterations, accuracy)`` wherever a run was evaluated."""
    return [(int(r["iterations"]), float(r["accuracy"])) for r in read(LOGS / log) if r.get("accuracy")]


def read_rows(path: Path = RESULTS / "zero_shot.csv") -> list[dict]:
    return read(path)


@click.command(help=__doc__)
@click.argument("run_dirs", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the test images of runs that were not evaluated.")
@click.option("--weights", type=click.Path(path_type=Path), help="Their float teacher's weights.")
@click.option("--stopped", type=click.Path(path_type=Path, exists=True, file_okay=False), multiple=True)
def main(run_dirs: tuple[Path, ...], data: Path | None, weights: Path | None, stopped: tuple[Path, ...]) -> None:
    for run_dir in run_dirs if data and weights else ():
        evaluate_run(run_dir, data, weights)
    rows = [row_of(run_dir) for run_dir in run_dirs]
    rows += [r for r in read_rows() if r["log"] not in {new["log"] for new in rows}]
    rows.sort(key=lambda r: (
        r["network"], r["teacher_weights_sha256"], r["weights"] == "per-kernel", r["weights"], r["activations"], r["bits"]))
    LOGS.mkdir(parents=True, exist_ok=True)
    for run_dir in run_dirs:
        shutil.copyfile(run_dir / "metrics.csv", LOGS / f"{run_dir.name}.csv")
    for run_dir in stopped:
        shutil.copyfile(run_dir / "metrics.csv", LOGS / f"{run_dir.name}{STOPPED}")
    write(RESULTS / "zero_shot.csv", FIELDS, rows)
    plot(rows, RESULTS / "zero_shot.png")
    replace_table(MARKER, table(read_rows()))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
