"""How often do student and teacher agree on natural images that nobody is tested on, and would wider scales help?

    python -m benchmarks.agreement RUN_DIR... --judge cifar100/train.npz [--weights FILE] [--widened 1.1]

For choosing settings without a test set: top-1 agreement of each run's student (``granq qat``) with its float teacher on unlabelled
images, and the mean squared difference of their logits; ``--widened`` also multiplies every learned static scale. Writes
``benchmarks/results/agreement.csv`` and its table in docs/results.md; rows of other runs stay.
"""

from pathlib import Path

import click

from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "agreement: written by python -m benchmarks.agreement"
HEADS = dict(
    run="run", network="network", bits="bits", activations="activations", judge="judged on", images="images",
    widened="learned scales x", agreement="agreement, %", logits="squared difference of logits")
FIELDS = tuple(HEADS)


def judge_batches(judge: Path, count: int, preprocessing) -> list:
    """Normalized batches of ``count`` images of an .npz file, always the same ones."""
    from zoo.data import read_npz
    from zoo.evaluate import input_batches
    return list(input_batches(read_npz(judge).subset(count, seed=1).images, preprocessing, 250))


def logits_of(network, batches: list):
    """``[N, classes]``, without gradient."""
    import torch
    with torch.no_grad():
        return torch.cat([network(x) for x in batches])


@click.command(help=__doc__)
@click.argument("run_dirs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--judge", type=click.Path(path_type=Path), required=True, help="Natural images, .npz; labels are not used.")
@click.option("--images", "count", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="The float teacher's weights, where the zoo ships none.")
@click.option("--widened", "factors", type=click.FloatRange(min=0, min_open=True), multiple=True, metavar="FACTOR")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(run_dirs, judge, count, weights, factors, threads) -> None:
    import torch

    from granq_plugin.zero_shot.losses import teacher_agreement
    from granq_plugin.zero_shot.training import learned_scales
    from zoo.registry import teacher_of
    from zoo.students import load_run
    torch.set_num_threads(threads)
    rows = []
    for run_dir in run_dirs:
        student, network, _ = load_run(run_dir)
        teacher = teacher_of(student.card, weights)[0].eval()
        batches = judge_batches(judge, count, student.card.preprocessing)
        scales = [(s, s.detach().clone()) for s in learned_scales(network)]
        t = logits_of(teacher, batches)
        for factor in (1.0, *factors) if scales else (1.0, ):
            for scale, own in scales:
                scale.data.copy_(factor * own)
            q = logits_of(network, batches)
            rows.append(dict(zip(FIELDS, (
                run_dir.name, student.card.name, student.quantization.bits, student.quantization.activations,
                f"{judge.parent.name}/{judge.name}", str(len(t)), f"{factor:g}", f"{100 * float(teacher_agreement(t, q)):.2f}",
                f"{float((q - t).square().mean()):.3f}"))))
            click.echo(rows[-1])
    file = RESULTS / "agreement.csv"
    new = {r["run"] for r in rows}
    rows = [r for r in read(file) if r["run"] not in new] + rows
    write(file, FIELDS, rows)
    replace_table(MARKER, table(rows))


def table(rows: list[dict]) -> str:
    """Markdown, a line for each run and factor."""
    lines = [list(HEADS.values()), ["---"] * len(HEADS), *([r[name] for name in HEADS] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
