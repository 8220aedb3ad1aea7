"""Which departures from the paper help a 3-bit student? One short run per switch, all on one run's synthetic images.

    python -m benchmarks.ablation RUN_DIR --weights FILE --judge cifar100/train.npz [--data DIR]

RUN_DIR is a run of ``granq qat`` with a memory; its network, bit widths and regime are taken. A switch is judged by the agreement
of student and teacher on unlabelled natural images that neither network was trained or is tested on (``--judge``, an ``.npz``
file); ``--data`` also prints test accuracy, which decides nothing. Writes ``benchmarks/results/ablation.csv`` and its
table in docs/results.md; with ``--only``, the other rows stay as they were.
"""

import time
from pathlib import Path

import click

from benchmarks.agreement import judge_batches, logits_of
from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "ablation: written by python -m benchmarks.ablation"
FIELDS = ("switch", "agreement", "top1", "seconds")
_CHANGED = dict(image_shift=4, image_flip=True, image_gain=2.0)
SWITCHES = {
    "as published: SGD, here 5e-4": {},
    "SGD, 2e-4": dict(student_lr=2e-4),
    "SGD, 1.5e-3": dict(student_lr=1.5e-3),
    "Adam, 3e-4": dict(student_optimizer="adam", student_lr=3e-4),
    "Adam, 1e-3": dict(student_optimizer="adam", student_lr=1e-3),
    "moving average of the weights": dict(ema_decay=0.98),
    "BatchNorm outputs x 1": dict(feature_loss="features", feature_weight=1.0),
    "BatchNorm outputs x 10": dict(feature_loss="features", feature_weight=10.0),
    "attention maps x 10": dict(feature_loss="attention", feature_weight=10.0),
    "sharpness-aware (twice the work)": dict(sam_rho=0.02),
    "low-pass filtered images": dict(low_pass=10.0),
    "images moved, mirrored, times 1/2 to 2": _CHANGED,
    "the same, and BatchNorm outputs x 10": dict(feature_loss="features", feature_weight=10.0, **_CHANGED),
    "weight ranges of least squared error": dict(weight_range_mode="mse"),
}
"""What each run changes of the first: settings of ``ZeroShotConfig`` or of ``Quantization``."""


@click.command(help=__doc__)
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="The float teacher's weights.")
@click.option("--judge", type=click.Path(path_type=Path), required=True, help="Unlabelled natural images, .npz.")
@click.option("--judge-images", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Also print accuracy on its test set.")
@click.option("--iterations", type=click.IntRange(min=1), default=400, show_default=True, help="Of each run, of 32 images.")
@click.option("--only", multiple=True, help="Only switches whose name contains this.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(run_dir, weights, judge, judge_images, data, iterations, only, threads) -> None:
    from dataclasses import fields, replace

    import torch

    import zoo.data
    import zoo.evaluate
    import zoo.weights
    from granq_plugin.zero_shot import preset, zero_shot_qat
    from granq_plugin.zero_shot.losses import teacher_agreement
    from granq_plugin.zero_shot.step import low_pass
    from zoo.quantization import Quantization
    from zoo.students import load_run

    torch.set_num_threads(threads)
    described, _, _ = load_run(run_dir)
    card = described.card
    teacher = card.build()
    zoo.weights.load_weights(teacher, weights)
    images = zoo.weights.read_state_dict(run_dir / "images.safetensors")["images"].float()
    batches = judge_batches(judge, judge_images, card.preprocessing)
    test_set = None if data is None else zoo.data.load_images(data, card.dataset)
    rows = []
    expected = logits_of(teacher, batches)
    for name, changes in SWITCHES.items():
        if only and not any(o in name for o in only):
            continue
        quantizers = {f.name: changes[f.name] for f in fields(Quantization) if f.name in changes}
        quantization = replace(described.quantization, **quantizers)
        config = preset(f"{card.dataset}_fast", memory_size=0, replay_steps=0, warmup_epochs=0, epochs=8,
                        iterations=max(1, iterations // 8), bf16=True, channels_last=True).replace(
                            **{k: v for k, v in changes.items() if k not in quantizers})
        seen = low_pass(images, config.low_pass) if config.low_pass else images
        start = time.perf_counter()
        try:
            student = zero_shot_qat(quantization.build(teacher, described.example_input()), teacher, config, images=seen).student
        except FloatingPointError as e:
            click.echo(f"{name}: {e}")
            continue
        seconds = time.perf_counter() - start
        agreement = float(teacher_agreement(expected, logits_of(student, batches)))
        row = dict(switch=name, agreement=f"{100 * agreement:.1f}", seconds=f"{seconds:.0f}")
        if test_set:
            row["top1"] = f"{zoo.evaluate.evaluate(student, test_set, card.preprocessing).top1:.2f}"
        click.echo(row)
        rows.append(row)
    file = RESULTS / "ablation.csv"
    if only:
        new = {r["switch"]: r for r in rows}
        rows = [new.pop(r["switch"], r) for r in read(file)] + list(new.values())
    write(file, FIELDS, rows)
    how = described.quantization
    replace_table(MARKER, table(read(file), f"{described.network}, {how.bits}, "
                                f"{how.weight_regime} weights, {how.activations} activations; {iterations} iterations "
                                f"of 32 images; agreement on {len(expected)} images of {judge.parent.name}/{judge.name}."))


def table(rows: list[dict], caption: str) -> str:
    """Markdown, in the order of the switches."""
    heads = dict(
        switch="switch", agreement="agreement with the teacher, %", top1="test top-1, % (decides nothing)", seconds="seconds")
    names = [n for n in FIELDS if any(r[n] for r in rows)]
    lines = [[heads[n] for n in names], ["---"] * len(names), *([r[n] for n in names] for r in rows)]
    return "\n".join([caption, "", *(f"| {' | '.join(line)} |" for line in lines)])


if __name__ == "__main__":
    main()
