"""From a finished run to a zoo entry: packed weights, card, log and settings."""

import csv
import datetime
import hashlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from granq_plugin import __version__
from granq_plugin.atomic import atomic_path, write_text
from granq_plugin.reading import read_json, read_text
from granq_plugin.zero_shot import ZeroShotConfig
from zoo.card import Card, Results, Teacher, Training, Weights
from zoo.costs import costs
from zoo.data import ImageSet
from zoo.evaluate import Accuracy, default_batch_size, evaluate
from zoo.packing import pack_network, pack_tensors
from zoo.registry import from_bytes, get_card, list_models, zoo_folder
from zoo.students import load_run
from zoo.train import TrainConfig
from zoo.weights import load_weights, read_state_dict, sha256

__all__ = ["Entry", "comparison", "entry_of_run", "measured", "write_card", "write_entry"]


@dataclass(frozen=True)
class Entry:
    """What is to be written. Attributes: card; data: the file of weights; run_dir: whose log and settings are copied."""
    card: Card
    data: bytes
    run_dir: Path


def entry_of_run(
        run_dir: str | Path,
        load_images: Callable[[Card], ImageSet],
        *,
        name: str | None = None,
        license: str | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], object] | None = None) -> Entry:
    """Pack the network of a finished run and evaluate what was packed.

    Args:
        run_dir: of ``granq qat`` or ``granq train-teacher``.
        load_images: gives the test set of a card.
        name: of the entry; default: the network's, for a quantized one with :attr:`zoo.quantization.Quantization.suffix`.
        license: of the weights; default: the teacher's, and BSD-3-Clause for a float network.
        progress: see :func:`zoo.evaluate.evaluate`.

    Raises:
        FileNotFoundError: if the folder holds no finished run. ValueError: for a name that no file can have, if the run's files are
            damaged, or the packed network does not return exactly the run's logits.
    """
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name of an entry must be letters, digits, '_', '.' and '-', got {name!r}")
    folder = Path(run_dir)
    make = _teacher_entry if (folder / "teacher.safetensors").is_file() else _student_entry
    entry, network, float_top1 = make(folder, name, license)
    shipped = from_bytes(entry.card, entry.data)
    test_set = load_images(entry.card)
    first = entry.card.preprocessing(next(test_set.batches(50))[0])
    with torch.no_grad():
        if not torch.equal(shipped(first), network.eval()(first)):
            raise ValueError(f"the packed network of {str(folder)!r} does not return the run's logits")
    preprocessing = entry.card.preprocessing
    accuracy = evaluate(shipped, test_set, preprocessing, batch_size or default_batch_size(preprocessing), progress=progress)
    return Entry(measured(entry.card, shipped, accuracy, test_set, float_top1=float_top1), entry.data, folder)


def measured(
        card: Card, network: nn.Module, accuracy: Accuracy, test_set: ImageSet, teacher_sha256: str | None = None,
        float_top1: float | None = None) -> Card:
    """A card with the results and costs of its network, and the hash of the float weights that were evaluated, if not its own."""
    results = Results(
        test_set.description, accuracy.total, accuracy.correct, accuracy.correct5, round(accuracy.top1, 2), round(accuracy.top5, 2),
        None if float_top1 is None else round(float_top1, 2))
    if teacher_sha256 is not None:
        card = replace(card, teacher=replace(card.teacher or Teacher("a file", "unknown"), sha256=teacher_sha256))
    return replace(card, results=results, costs=costs(network, card.example_input()), date=datetime.date.today().isoformat())


def comparison(
        card: Card, accuracy: Accuracy, test_set: ImageSet, teacher_sha256: str | None, tolerance: int) -> tuple[bool, str]:
    """Whether an evaluation is the card's, to within ``tolerance`` images, and that in words. What is not comparable agrees."""
    if card.results is None:
        return True, "the card has no results to compare with"
    if teacher_sha256 is not None and teacher_sha256 != (card.teacher and card.teacher.sha256):
        return True, "not compared with the card, which is of other weights"
    if (card.results.images, card.results.data) != (accuracy.total, test_set.description):
        return True, f"not compared with the card, which is of {card.results.images} images: {card.results.data}"
    distances = [abs(accuracy.correct - card.results.correct), abs(accuracy.correct5 - card.results.correct5)]
    said = f"card: {card.results.correct} and {card.results.correct5} of {card.results.images}; tolerance: "
    said += f"{tolerance} images" if tolerance else "equal counts"
    return max(distances) <= tolerance, f"{'equal to' if not max(distances) else 'differs from'} the {said}"


def write_card(card: Card, reference: str, zoo_dir: str | Path | None = None) -> Path:
    """Write the card of an entry, or of a card file, back; returns the path."""
    path = Path(reference) if reference.endswith(".toml") else _folder(zoo_dir) / "cards" / f"{card.name}.toml"
    write_text(path, card.to_toml())
    return path


def _folder(zoo_dir: str | Path | None) -> Path:
    return Path(str(zoo_folder(zoo_dir)))


def write_entry(entry: Entry, zoo_dir: str | Path | None = None, *, overwrite: bool = False) -> list[Path]:
    """Write an entry's files; returns them. All are written before the first takes its name, the card last: a full disk leaves
    everything as it was.

    Raises:
        ValueError: if the zoo has an entry of that name with weights, unless ``overwrite``. OSError: if a file cannot be written.
    """
    root, name = _folder(zoo_dir), entry.card.name
    if not overwrite and name in list_models("*", root) and get_card(name, root).weights is not None:
        raise ValueError(f"the zoo in {str(root)!r} has an entry {name!r} with weights already; --overwrite replaces it")
    contents = {  # the card first, so that it is renamed last
        root / "cards" / f"{name}.toml": entry.card.to_toml().encode(),
        root / "pretrained" / f"{name}.safetensors": entry.data,
        root / entry.card.training.log: (entry.run_dir / "metrics.csv").read_bytes()}
    if entry.card.training.config:
        contents[root / entry.card.training.config] = (entry.run_dir / "config.toml").read_bytes()
    with ExitStack() as stack:
        for file, data in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic_path(file)).write_bytes(data)
    return [*reversed(contents)]


def _student_entry(folder: Path, name: str | None, license: str | None):
    student, network, run = load_run(folder)
    base = student.card
    _check_named(folder, base, name)
    name = name or f"{base.name}.{student.quantization.suffix}"
    teacher = _teacher(base, _entry(run, "teacher_weights_sha256", str))
    quantization = student.quantization
    calibrated = read_state_dict(folder / "calibrated.safetensors") if quantization.activations == "folded" else None
    data = pack_network(network, calibrated)
    epochs = ZeroShotConfig.from_file(folder / "config.toml").epochs
    _check_log(folder / "metrics.csv", epochs)
    options = [f"--weight-bits {quantization.weight_bit_width} --act-bits {quantization.act_bit_width}"]
    options += [f"--activations {quantization.activations} --weight-regime {quantization.weight_regime}"]
    options += ["--learned-scale"] if quantization.learned_scale else []
    options += [] if quantization.weight_range_mode == "minmax" else [f"--weight-range {quantization.weight_range_mode}"]
    options += [] if quantization.act_range_mode == "ema" else [f"--act-range {quantization.act_range_mode}"]
    options += [f"--config configs/{name}.toml --weights FILE"] + (["--images FILE"] if run.get("images_sha256") else [])
    command = f"granq qat {base.name} {' '.join(options)} --out RUN_DIR"
    training = Training(epochs, _entry(run, "version", str), f"logs/{name}.csv", f"configs/{name}.toml")
    words = (f"{base.name}, {quantization.bits}, {quantization.weight_regime} weights, {quantization.activations} activations, "
             "zero-shot QAT")
    card = replace(
        _described(base, name, data, license or teacher.license, command, training), description=words, teacher=teacher,
        quantization=quantization)
    return Entry(card, data, folder), network, _entry(run, "float_top1", float) if "float_top1" in run else None


def _teacher_entry(folder: Path, name: str | None, license: str | None):
    run = read_json(folder / "run.json")
    base = get_card(str(folder / "card.toml") if (folder / "card.toml").is_file() else _entry(run, "network", str))
    _check_named(folder, base, name)
    name = name or base.name
    file = folder / "teacher.safetensors"
    if sha256(file) != _entry(run, "teacher_sha256", str):
        raise ValueError(f"{str(file)!r} does not have the SHA-256 that run.json names: it is damaged or of another run")
    network = base.build()
    load_weights(network, file)
    data = pack_tensors(network.state_dict())
    config = folder / "config.toml"
    epochs = TrainConfig.from_file(config).epochs if config.is_file() else _entry(run, "epochs", int)
    _check_log(folder / "metrics.csv", epochs)
    training = Training(
        epochs, run.get("version", __version__), f"logs/{name}.csv", f"configs/{name}.toml" if config.is_file() else None)
    card = _described(base, name, data, license or "BSD-3-Clause", _without_paths(_entry(run, "command", str)), training)
    return Entry(replace(card, description=f"{base.name}, float, trained by granq train-teacher"), data, folder), network, None


def _check_named(folder: Path, base: Card, name: str | None) -> None:
    if name is None and base.name == "card":
        raise ValueError(f"the run in {str(folder)!r} is of a network of your own: give --name for its entry")


def _entry(run: dict, name: str, kind: type):
    """A value of run.json. Raises a ValueError if it is absent or of another type."""
    if not isinstance(run.get(name), kind):
        raise ValueError(f"run.json must say {name} ({kind.__name__}), got {run.get(name)!r}")
    return run[name]


def _check_log(file: Path, epochs: int) -> None:
    """Raise a ValueError unless a file is the log of so many epochs."""
    rows = list(csv.DictReader(read_text(file).splitlines()))
    if not rows or rows[-1].get("epoch") != str(epochs):
        raise ValueError(f"{str(file)!r} is not the log of {epochs} epochs")


def _described(base: Card, name: str, data: bytes, license: str, command: str, training: Training) -> Card:
    return Card(
        name=name, architecture=base.architecture, architecture_args=base.architecture_args, dataset=base.dataset,
        num_classes=base.num_classes, preprocessing=base.preprocessing, preset=base.preset, command=command, license=license,
        date=datetime.date.today().isoformat(), training=training,
        weights=Weights(hashlib.sha256(data).hexdigest(), len(data), license))


def _teacher(base: Card, digest: str) -> Teacher:
    if base.teacher is not None and base.teacher.sha256 in (None, digest):
        return replace(base.teacher, sha256=digest)
    if base.weights is not None and base.weights.sha256 == digest:
        return Teacher(f"zoo entry {base.name}", base.weights.license, digest)
    return Teacher("other weights than the zoo's of this network", base.license or "unknown", digest)


def _without_paths(command: str) -> str:
    """A command without the folders of the machine that it ran on."""
    return re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", command)
