"""Quantized students of a zoo network: built from a description, and found again in a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from granq_plugin.reading import read_json
from zoo.card import Card
from zoo.quantization import Quantization
from zoo.registry import calibrated_from_bytes, from_bytes, get_card, read_weights

if TYPE_CHECKING:  # the command line reads this file without torch
    from torch import Tensor, nn

__all__ = ["Student", "calibrated_network", "calibrator", "load_run", "static_and_folded"]


@dataclass(frozen=True)
class Student:
    """Which network is quantized, and how.

    Attributes:
        network: name of the zoo entry, or path of a card file.
    """
    network: str
    quantization: Quantization

    @property
    def card(self) -> Card:
        return get_card(self.network)

    def prepared(self, teacher: nn.Module) -> nn.Module:
        """With folded activations: the static network that is calibrated, then folded."""
        return self.quantization.prepared(teacher, self.example_input())

    def example_input(self) -> Tensor:
        return self.card.example_input()


def calibrator(batches: Iterable[Tensor]) -> Callable[[nn.Module], nn.Module]:
    """For :meth:`zoo.quantization.Quantization.build`: collects ranges over normalized batches ``[B, 3, S, S]``."""
    def calibrate(model: nn.Module) -> nn.Module:
        import torch
        from brevitas.graph.calibrate import calibration_mode
        with torch.no_grad(), calibration_mode(model):
            for batch in batches:
                model(batch)
        return model.eval()
    return calibrate


def load_run(run_dir: str | Path) -> tuple[Student, nn.Module, dict]:
    """The trained network of a run of ``granq qat``, as it is deployed.

    Returns:
        ``(student, network, run)``: the network in evaluation mode, and the entries of ``run.json``.

    Raises:
        FileNotFoundError: if the folder holds no finished run. ValueError: if its files are damaged or do not belong together.
    """
    from zoo.weights import read_state_dict, sha256
    folder = Path(run_dir)
    for name in ("run.json", "student.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no finished run of granq qat (in Python: zoo.qat.train_student): "
                                    f"there is no {name}")
    run = read_json(folder / "run.json")
    try:
        network, quantization = run["network"], Quantization(**{f.name: run[f.name] for f in fields(Quantization) if f.name in run})
        expected = run["student_sha256"]
        if not isinstance(network, str) or (network.endswith(".toml") and network != "card.toml"):
            raise ValueError(f"network must be a zoo entry or card.toml, got {network!r}")
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{str(folder / 'run.json')!r} is not what granq qat writes: {e!r}") from e
    # the user's own network has a card in the run's folder
    student = Student(str(folder / network) if network == "card.toml" else network, quantization)
    if sha256(folder / "student.safetensors") != expected:
        raise ValueError(f"{str(folder / 'student.safetensors')!r} does not have the SHA-256 that run.json names: it is damaged or "
                         "of another run")
    state = read_state_dict(folder / "student.safetensors")
    network = student.quantization.deployable(
        student.card.build(), student.example_input(), lambda prepared: _calibrated_as(prepared, folder))
    return student, _loaded(network, state, folder / "student.safetensors"), run


def _loaded(network: nn.Module, state: dict[str, Tensor], file: Path) -> nn.Module:
    try:
        network.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"{str(file)!r} is not what this version of granq qat saves: {str(e).splitlines()[-1].strip()}") from e
    return network.eval()


def calibrated_network(run_dir: str | Path) -> nn.Module:
    """Of a run with folded activations: the static network before training and folding.

    Raises:
        ValueError: for other runs. FileNotFoundError: see :func:`load_run`.
    """
    student, _, _ = load_run(run_dir)
    activations = student.quantization.activations
    if activations != "folded":
        raise ValueError(f"{str(run_dir)!r} has {activations} activations: nothing was folded")
    return _calibrated_as(student.prepared(student.card.build()), Path(run_dir))


def static_and_folded(source: str | Path) -> tuple[nn.Module, nn.Module | None]:
    """The network with static ranges of a run's folder or a zoo entry, and what became of it by folding; None if it is not folded.

    Raises:
        ValueError: for dynamic activations, a float network, an unknown entry. FileNotFoundError: see :func:`load_run` and
            :func:`zoo.registry.read_weights`.
    """
    if Path(source).is_dir():
        student, network, _ = load_run(source)
        quantization, calibrated = student.quantization, lambda: calibrated_network(source)
    else:
        card = get_card(str(source))
        quantization = card.quantization
        if quantization is None:
            raise ValueError(f"{card.name!r} is a float network: it has no ranges")
        data = read_weights(card)
        network, calibrated = from_bytes(card, data), lambda: calibrated_from_bytes(card, data)
    if quantization.activations == "dynamic":
        raise ValueError(f"{str(source)!r} has dynamic activations, whose ranges are every image's own; draw static or folded ones")
    return (calibrated(), network) if quantization.activations == "folded" else (network, None)


def _calibrated_as(prepared: nn.Module, folder: Path) -> nn.Module:
    from zoo.weights import read_state_dict
    file = folder / "calibrated.safetensors"
    return _loaded(prepared, read_state_dict(file), file)
