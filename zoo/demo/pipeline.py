"""From the float network to verified files and a report: :func:`run_demo`."""

import contextlib
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from granq_plugin import __version__
from granq_plugin.atomic import write_text
from granq_plugin.deploy import check_finn, export_finn, fold
from granq_plugin.export import export_qonnx, verify
from granq_plugin.export import report as costs_of
from granq_plugin.reading import read_json
from granq_plugin.zero_shot import ZeroShotConfig, preset
from zoo.data import ImageSet, load_images
from zoo.demo.folder import open_folder
from zoo.demo.page import page
from zoo.demo.pictures import draw
from zoo.evaluate import evaluate, input_batches, wilson_interval
from zoo.qat import train_student
from zoo.quantization import Quantization
from zoo.registry import get_card, teacher_of
from zoo.students import calibrated_network, load_run
from zoo.weights import sha256

__all__ = ["NETWORK", "run_demo"]

NETWORK = "resnet8_digits"
RUNS = ("dynamic", "static", "folded")

Stage = Callable[[str, int], Callable[[int], object]]
"""Called at the start of a stage with its words and its number of steps; returns what is called with steps done."""


def run_demo(
        out: str | Path,
        weight_bit_width: int = 3,
        act_bit_width: int = 3,
        *,
        config: ZeroShotConfig | None = None,
        test_set: ImageSet | None = None,
        stage: Stage = lambda words, total: lambda done: None) -> dict:
    """Quantize the shipped digits network without its training data, train it, fold it, export it, verify the file, and report.

    ``out`` gets the runs ``dynamic``, ``static`` and ``folded`` (as of ``granq qat``), the exported network, pictures,
    ``report.json`` and ``report.html``. A demo that was interrupted goes on where its last checkpoint is; one that is finished is
    only reported again.

    Args:
        out: a new or empty folder, or that of the same demo. weight_bit_width, act_bit_width: 2 to 8.
        config: of the first run; the others learn from its images, four times as fast. Default: the preset ``digits_fast``.
        test_set: default: the digits' test images. Training never sees it.
        stage: for progress.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: for other bit widths. FileExistsError, NotADirectoryError: see :func:`zoo.demo.folder.open_folder`.
        ModuleNotFoundError: without the extra ``demo``.
    """
    for name, value in (("weight_bit_width", weight_bit_width), ("act_bit_width", act_bit_width)):
        if value not in range(2, 9):
            raise ValueError(f"{name} must be a whole number from 2 to 8, got {value!r}")
    out, start = Path(out), time.perf_counter()
    card = get_card(NETWORK)
    config = config or preset(f"{card.dataset}_fast")
    bits = f"W{weight_bit_width}A{act_bit_width}"
    test_set = test_set or load_images(None, card.dataset)
    teacher, digest = teacher_of(card)
    resumed = open_folder(out, dict(bits=bits, network=NETWORK, teacher_sha256=digest, version=__version__), RUNS)
    ladder = []

    def measured(key: str, network: nn.Module) -> None:
        accuracy = evaluate(network, test_set, card.preprocessing)
        low, high = wilson_interval(accuracy.correct, accuracy.total)
        ladder.append(dict(key=key, correct=accuracy.correct, top1=accuracy.top1, low=low, high=high,
                           retention=accuracy.correct / max(1, ladder[0]["correct"]) if ladder else 1.0))

    def trained(kind: str, words: str, config: ZeroShotConfig, images=None, images_digest=None):
        regime = "per-output-channel-symmetric" if kind == "folded" else "per-output-channel"
        quantization = Quantization(weight_bit_width, act_bit_width, regime, kind)
        update, done_before = stage(words, config.total_iterations), 0

        def on_iteration(done: int, _) -> None:
            nonlocal done_before
            update(done - done_before)  # a resumed run starts with the iterations that were done before
            done_before = done
        run = train_student(
            card, quantization, teacher, config, out / kind, teacher_sha256=digest, images=images, images_sha256=images_digest,
            test_set=test_set, resume=True, on_iteration=on_iteration)
        update(config.total_iterations - done_before)
        return run.result

    measured("float", teacher)
    measured("before", Quantization(weight_bit_width, act_bit_width).build(teacher, card.example_input()))
    result = trained("dynamic", f"zero-shot QAT, {bits}", config)
    measured("dynamic", load_run(out / "dynamic")[1])
    images, images_digest = result.images, sha256(out / "dynamic" / "images.safetensors")
    from_images = config.replace(memory_size=0, replay_steps=0, student_lr=4 * config.student_lr)  # nothing moves but the student
    trained("static", "with static ranges", from_images, images, images_digest)
    measured("static", load_run(out / "static")[1])
    trained("folded", "folded, for FPGAs", from_images, images, images_digest)
    static = calibrated_network(out / "folded")
    measured("folded_before", fold(static, card.example_input()).eval())
    deployed = load_run(out / "folded")[1]
    measured("folded", deployed)

    name = f"{card.dataset}_{bits.lower()}"
    files = dict(qonnx=out / f"{name}_qonnx.onnx", finn=out / f"{name}_finn.onnx")
    metadata = dict(network=NETWORK, teacher_weights_sha256=digest, top1=ladder[-1]["top1"], test_images=len(test_set))
    inputs = torch.cat(list(input_batches(test_set.images, card.preprocessing, 1000)))
    update = stage("verifying the exported files", 3 * len(test_set))
    checked = dict(labels=test_set.labels, progress=update)
    with _quiet():
        export_qonnx(deployed, card.example_input(), files["qonnx"], metadata=metadata)
        export_finn(deployed, card.example_input(), files["finn"], metadata=metadata)
        verifications = [
            verify(files["qonnx"], deployed, inputs, executors=("onnxruntime", "qonnx"), **checked),
            # for FINN, which takes one image at a time
            verify(files["finn"], deployed, inputs, executors=("onnxruntime", ), integers=False, **checked)]
        costs = costs_of(files["qonnx"])
        rules = check_finn(files["finn"])
    report = dict(
        network=NETWORK, dataset=card.dataset, test_images=len(test_set), weight_bit_width=weight_bit_width,
        act_bit_width=act_bit_width, bits=bits, ladder=ladder,
        verification=[dict(file=Path(v.path).name, agrees=v.agrees, rtol=v.rtol, executors=[asdict(a) for a in v.agreements])
                      for v in verifications],
        finn=[dict(rule=r.rule, node=r.node, passed=r.passed, message=r.message) for r in rules],
        costs=dict(network=costs.totals(), at_8_bits=costs.totals(8), at_float32=costs.totals(32)),
        training=dict(iterations=config.total_iterations, batch_size=config.batch_size, seed=config.seed,
                      synthetic_images=len(images), agreement=result.metrics[-1]["agreement"]),
        teacher_sha256=digest, resumed=resumed, version=__version__, torch=torch.__version__,
        python=platform.python_version())
    pictures = draw(
        out, ladder, bits, result.generator.sample(60), inputs, test_set.labels, static, deployed, card)
    report["seconds"] = _seconds(out / "report.json") or round(time.perf_counter() - start, 1)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "report.html", page(report, pictures))
    return report


def _seconds(report: Path) -> float | None:
    """How long a demo took that is only reported again; None for one that was not finished."""
    try:
        return read_json(report)["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _quiet():
    """Without the exporters' warnings, which are about their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
