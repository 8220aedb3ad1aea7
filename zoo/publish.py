"""From a finished run to a zoo entry: packed weights, card, log and settings."""

import datetime
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from granq_plugin import __version__
from granq_plugin.atomic import atomic_path, write_text
from zoo.card import Card, Results, Teacher, Training, Weights
from zoo.costs import costs
from zoo.data import ImageSet
from zoo.evaluate import Accuracy, evaluate
from zoo.packing import pack_network, pack_tensors
from zoo.registry import from_bytes, get_card, list_models
from zoo.students import load_run
from zoo.weights import load_weights, read_state_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Entry", "entry_of_run", "results_of", "write_entry"]


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
        batch_size: int = 250,
        progress: Callable[[int], object] | None = None) -> Entry:
    """Pack the network of a finished run and evaluate what was packed.

    Args:
        run_dir: of ``granq qat`` or ``granq train-teacher``.
        load_images: gives the test set of a card.
        name: of the entry; default: the network's, for a quantized one with :attr:`zoo.quantization.Quantization.suffix`.
        license: of the weights; default: the teacher's.
        progress: see :func:`zoo.evaluate.evaluate`.

    Raises:
        FileNotFoundError: if the folder holds no finished run. ValueError: if its files are damaged, or the packed network does not
            return exactly the run's logits.
    """
    folder = Path(run_dir)
    make = _teacher_entry if (folder / "teacher.safetensors").is_file() else _student_entry
    entry, network, float_top1 = make(folder, name, license)
    shipped = from_bytes(entry.card, entry.data)
    test_set = load_images(entry.card)
    first = entry.card.preprocessing(next(test_set.batches(min(batch_size, 50)))[0])
    with torch.no_grad():
        if not torch.equal(shipped(first), network.eval()(first)):
            raise ValueError(f"the packed network of {str(folder)!r} does not return the run's logits")
    accuracy = evaluate(shipped, test_set, entry.card.preprocessing, batch_size, progress=progress)
    card = replace(entry.card, results=results_of(accuracy, test_set, float_top1), costs=costs(shipped, entry.card.example_input()))
    return Entry(card, entry.data, folder)


def results_of(accuracy: Accuracy, test_set: ImageSet, float_top1: float | None = None) -> Results:
    """An evaluation as a card says it."""
    return Results(
        test_set.description, accuracy.total, accuracy.correct, accuracy.correct5, round(accuracy.top1, 2), round(accuracy.top5, 2),
        None if float_top1 is None else round(float_top1, 2))


def write_entry(entry: Entry, zoo_dir: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write an entry's files, the card last; returns them. Each is whole or not there.

    Raises:
        ValueError: if the zoo has an entry of that name with weights, unless ``overwrite``. OSError: if a file cannot be written.
    """
    root, name = Path(zoo_dir), entry.card.name
    if not overwrite and name in list_models("*", root) and get_card(name, root).weights is not None:
        raise ValueError(f"the zoo in {str(root)!r} has an entry {name!r} with weights already; --overwrite replaces it")
    files = [root / "pretrained" / f"{name}.safetensors", root / entry.card.training.log]
    for folder in ("cards", "pretrained", "logs", "configs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with atomic_path(files[0]) as part:
        part.write_bytes(entry.data)
    copies = [(entry.run_dir / "metrics.csv", files[1])]
    if entry.card.training.config:
        files.append(root / entry.card.training.config)
        copies.append((entry.run_dir / "config.toml", files[2]))
    for source, target in copies:
        with atomic_path(target) as part:
            shutil.copyfile(source, part)
    files.append(root / "cards" / f"{name}.toml")
    write_text(files[-1], entry.card.to_toml())
    return files


def _student_entry(folder: Path, name: str | None, license: str | None):
    student, network, run = load_run(folder)
    base = student.card
    if name is None and base.name == "card":
        raise ValueError(f"the run in {str(folder)!r} is of a network of your own: give --name for its entry")
    name = name or f"{base.name}.{student.quantization.suffix}"
    teacher = _teacher(base, run["teacher_weights_sha256"])
    calibrated = read_state_dict(folder / "calibrated.safetensors") if student.activations == "folded" else None
    data = pack_network(network, calibrated)
    settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    options = [f"--weight-bits {student.weight_bit_width} --act-bits {student.act_bit_width}"]
    options += [f"--activations {student.activations} --weight-regime {student.weight_regime}"]
    options += ["--learned-scale"] if student.learned_scale else []
    options += [f"--config configs/{name}.toml --weights FILE"] + (["--images FILE"] if run.get("images_sha256") else [])
    training = Training(
        f"granq qat {base.name} {' '.join(options)} --out RUN_DIR", settings["epochs"], run.get("version", __version__),
        f"logs/{name}.csv", f"configs/{name}.toml")
    words = (f"{base.name}, {student.quantization.bits}, {student.weight_regime} weights, {student.activations} activations, "
             "zero-shot QAT")
    card = replace(
        _described(base, name, data, license or teacher.license, training), description=words, teacher=teacher,
        quantization=student.quantization)
    return Entry(card, data, folder), network, run.get("float_top1")


def _teacher_entry(folder: Path, name: str | None, license: str | None):
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    base = get_card(str(folder / "card.toml") if (folder / "card.toml").is_file() else run["network"])
    name = name or base.name
    file = folder / "teacher.safetensors"
    if hashlib.sha256(file.read_bytes()).hexdigest() != run["teacher_sha256"]:
        raise ValueError(f"{str(file)!r} does not have the SHA-256 that run.json names: it is damaged or of another run")
    network = base.build()
    load_weights(network, file)
    data = pack_tensors(network.state_dict())
    config = folder / "config.toml"
    settings = tomllib.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    training = Training(
        _without_paths(run["command"]), settings.get("epochs", run.get("epochs", 0)), run.get("version", __version__),
        f"logs/{name}.csv", f"configs/{name}.toml" if config.is_file() else None)
    card = _described(base, name, data, license or "BSD-3-Clause", training)
    return Entry(replace(card, description=f"{base.name}, float, trained by granq train-teacher"), data, folder), network, None


def _described(base: Card, name: str, data: bytes, license: str, training: Training) -> Card:
    return Card(
        name=name, architecture=base.architecture, architecture_args=base.architecture_args, dataset=base.dataset,
        num_classes=base.num_classes, preprocessing=base.preprocessing, preset=base.preset, license=license,
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
