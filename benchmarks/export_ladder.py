"""Accuracy from float to the exported file, on the whole test set: the ladder of :mod:`benchmarks.export`."""

import tempfile
from pathlib import Path

import torch

LADDER_FIELDS = ("network", "bits", "rung", "weights", "training", "run", "correct", "images", "same_top1_as_folded")


def untrained_rungs(model, calibration: list, test_set, preprocessing) -> list[dict]:
    """ResNet-20 without training: float, dynamic, static, folded, and the file in onnxruntime."""
    from benchmarks.export import BIT_WIDTHS, quantized_as
    from zoo.evaluate import evaluate
    rows = []
    full_precision = evaluate(model, test_set, preprocessing).correct
    for bits in BIT_WIDTHS:
        common = ("resnet20_cifar10", bits), ("none", "")
        counts = [("float", "float", full_precision, "")]
        for kind in ("dynamic", "static"):
            network = quantized_as(kind, model, bits, calibration)
            counts.append((kind, "per-output-channel", evaluate(network, test_set, preprocessing).correct, ""))
        counts += _folded_and_file(quantized_as("folded", model, bits, calibration), calibration[0][:1], test_set, preprocessing)
        rows += [_row(common, *count, len(test_set)) for count in counts]
    return rows


def rungs_of_run(run_dir: Path, test_set, teacher_weights: Path) -> list[dict]:
    """The rung of a run of ``granq qat`` as it is loaded again; of a folded one, two: the network and its file in onnxruntime.

    Raises:
        ValueError: if the run's teacher has other weights, or the accuracy is not the one in its run.json.
    """
    from granq_plugin.zero_shot import ZeroShotConfig
    from zoo.evaluate import evaluate
    from zoo.students import load_run
    from zoo.weights import sha256
    student, network, run = load_run(run_dir)
    if run["teacher_weights_sha256"] != sha256(teacher_weights):
        raise ValueError(f"{str(run_dir)!r} has another teacher than {str(teacher_weights)!r}")
    config, quantization = ZeroShotConfig.from_file(run_dir / "config.toml"), student.quantization
    images = "another run's" if run["images_sha256"] else "its generator's"
    common = ((student.network, quantization.act_bit_width),
              (f"{config.total_iterations:,} x {config.batch_size}, {images} images", run_dir.name))
    preprocessing = student.card.preprocessing
    if quantization.activations == "folded":
        counts = _folded_and_file(network, student.example_input(), test_set, preprocessing)
    else:
        counts = [(quantization.activations, quantization.weight_regime, evaluate(network, test_set, preprocessing).correct, "")]
    if "top1" in run and abs(100 * counts[0][2] / len(test_set) - run["top1"]) > 1e-6:
        raise ValueError(f"{str(run_dir)!r}: {counts[0][2]} of {len(test_set)} correct, but run.json says {run['top1']:.2f} %")
    return [_row(common, *count, len(test_set)) for count in counts]


def _row(common, rung: str, weights: str, correct: int, same, images: int) -> dict:
    (network, bits), (training, run) = common
    return dict(zip(LADDER_FIELDS, (network, bits, rung, weights, training, run, correct, images, same)))


def _folded_and_file(folded, example, test_set, preprocessing) -> list[tuple]:
    from granq_plugin.export import export_qcdq, verify
    from zoo.evaluate import input_batches
    images = torch.cat(list(input_batches(test_set.images, preprocessing, 1000)))
    with tempfile.TemporaryDirectory() as folder:
        path = export_qcdq(folded, example, Path(folder, "model.onnx"))
        a, = verify(path, folded, images, labels=test_set.labels, executors=("onnxruntime", ), batch_size=200,
                    integers=False).agreements
    regime = "per-output-channel-symmetric"
    return [("folded", regime, a.torch_correct, ""), ("exported file", regime, a.correct, a.top1)]


def ladder_table(rows: list[dict]) -> list[str]:
    """Markdown lines: from float down, each network and bit width by itself."""
    order = ["float", "dynamic", "static", "folded", "exported file"]
    lines = ["", "| network | bits | rung | weights | zero-shot QAT | top-1 % | same top-1 as folded |",
             "|---|---|---|---|---|---|---|"]
    for key in dict.fromkeys((r["network"], r["bits"]) for r in rows):
        of_key = sorted((r for r in rows if (r["network"], r["bits"]) == key),
                        key=lambda r: (r["training"] != "none", order.index(r["rung"])))
        for r in of_key:
            percent = 100 * int(r["correct"]) / int(r["images"])
            same = f"{r['same_top1_as_folded']} of {r['images']}" if r["same_top1_as_folded"] else "-"
            bits, training = ("float32", "-") if r["rung"] == "float" else (f"W{key[1]}A{key[1]}", r["training"])
            lines.append(f"| {key[0]} | {bits} | {r['rung']} | {r['weights']} | {training} | {percent:.2f} | {same} |")
    return lines if rows else []
