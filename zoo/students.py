"""Quantized students of a zoo network: built from a description, and found again in a run's folder."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from zoo.registry import Card, get_card
from zoo.weights import read_state_dict, sha256

__all__ = ["ACTIVATIONS", "WEIGHT_REGIMES", "Student", "calibrated_network", "calibrator", "load_run"]

WEIGHT_REGIMES = {
    "per-output-channel": "GranQWeightPerChannel",
    "per-output-channel-symmetric": "GranQWeightPerChannelSymmetric",
    "per-kernel": "GranQWeightPerKernel",
}
ACTIVATIONS = ("dynamic", "static", "folded")


@dataclass(frozen=True)
class Student:
    """How a student is quantized.

    Attributes:
        network: name of the zoo entry. weight_bit_width, act_bit_width: 1 to 16. weight_regime: of WEIGHT_REGIMES.
        activations: "dynamic" (the paper), "static", or "folded": static, with quantizers for the input, residual branches and
            pools, weights quantized after multiplication with the scales (for FINN; ``granq_plugin.deploy``).
        learned_scale: static scales go on learning once they are frozen.
    """
    network: str
    weight_bit_width: int
    act_bit_width: int
    weight_regime: str = "per-output-channel"
    activations: str = "dynamic"
    learned_scale: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("weight_regime", tuple(WEIGHT_REGIMES)), ("activations", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.learned_scale and self.activations != "static":
            raise ValueError(f"learned_scale needs static activations, got {self.activations}")
        if self.activations == "folded" and self.weight_regime != "per-output-channel-symmetric":
            raise ValueError(f"folded activations need per-output-channel-symmetric weights, got {self.weight_regime}")

    @property
    def card(self) -> Card:
        return get_card(self.network)

    def build(self, teacher: nn.Module, calibrate: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
        """The student of a float network with the teacher's weights, before training.

        Args:
            calibrate: for folded activations: gives the prepared network its ranges, and returns it.

        Raises:
            ValueError: for folded activations without ``calibrate``; and see :func:`granq_plugin.quantize`.
        """
        import granq_plugin as gq
        weight_quant = getattr(gq, WEIGHT_REGIMES[self.weight_regime])
        if self.activations != "folded":
            act_quant = gq.GranQActPerChannel
            if self.activations == "static":
                act_quant = gq.GranQActPerChannelStatic.let(learned_scale=self.learned_scale)
            return gq.quantize(teacher, self.weight_bit_width, self.act_bit_width, weight_quant=weight_quant, act_quant=act_quant)
        if calibrate is None:
            raise ValueError("folded activations need ranges first: images of another run, or calibration data")
        from granq_plugin.deploy import fold
        return fold(calibrate(self.prepared(teacher)), self.example_input(), trainable=True)

    def deployed(self, trained: nn.Module) -> nn.Module:
        """What is deployed of a trained student, whose accuracy is measured and which is saved: of a folded one a baked copy,
        cleared of rounding ties; any other is deployed as it is."""
        if self.activations != "folded":
            return trained
        from granq_plugin.deploy import bake, clear_ties
        return clear_ties(bake(trained), self.example_input().to(next(trained.parameters()).device), inplace=True)[0].eval()

    def prepared(self, teacher: nn.Module) -> nn.Module:
        """With folded activations: the static network that is calibrated, then folded."""
        import granq_plugin as gq
        from granq_plugin.deploy import prepare
        return prepare(
            _deployable(teacher), self.example_input(), self.weight_bit_width, self.act_bit_width,
            weight_quant=getattr(gq, WEIGHT_REGIMES[self.weight_regime]), act_quant=gq.GranQActPerChannelStatic)

    def example_input(self) -> Tensor:
        import torch
        size = self.card.preprocessing.image_size
        return torch.zeros(1, 3, size, size)


def calibrator(batches: Iterable[Tensor]) -> Callable[[nn.Module], nn.Module]:
    """For :meth:`Student.build`: collects ranges over normalized batches ``[B, 3, S, S]``."""
    def calibrate(model: nn.Module) -> nn.Module:
        import torch
        from brevitas.graph.calibrate import calibration_mode
        with torch.no_grad(), calibration_mode(model):
            for batch in batches:
                model(batch)
        return model.eval()
    return calibrate


def _deployable(teacher: nn.Module) -> nn.Module:
    """Padding shortcuts as convolutions, which accelerators map."""
    from zoo.models.cifar_resnet import CifarResNet, convolution_shortcuts
    return convolution_shortcuts(teacher) if isinstance(teacher, CifarResNet) else teacher


def load_run(run_dir: str | Path) -> tuple[Student, nn.Module, dict]:
    """The trained network of a run of ``granq qat``, as it is deployed.

    Returns:
        ``(student, network, run)``: the network in evaluation mode, and the entries of ``run.json``.

    Raises:
        FileNotFoundError: if the folder holds no finished run. ValueError: if its files are damaged or do not belong together.
    """
    folder = Path(run_dir)
    for name in ("run.json", "student.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no finished run of granq qat: there is no {name}")
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        student = Student(**{k: run[k] for k in asdict(Student("", 1, 1))})
        expected = run["student_sha256"]
    except (json.JSONDecodeError, KeyError) as e:
        raise ValueError(f"{str(folder / 'run.json')!r} is not what granq qat writes: {e!r}") from e
    if sha256(folder / "student.safetensors") != expected:
        raise ValueError(f"{str(folder / 'student.safetensors')!r} does not have the SHA-256 that run.json names: it is damaged or "
                         "of another run")
    state = read_state_dict(folder / "student.safetensors")
    network = student.build(student.card.build(), lambda prepared: _calibrated_as(prepared, folder))
    if student.activations == "folded":  # what was saved is baked
        from granq_plugin.deploy import bake
        network = bake(network)
    try:
        network.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"{str(folder / 'student.safetensors')!r} is not what this version of granq qat saves: "
                         f"{str(e).splitlines()[-1].strip()}") from e
    return student, network.eval(), run


def calibrated_network(run_dir: str | Path) -> nn.Module:
    """Of a run with folded activations: the static network before training and folding.

    Raises:
        ValueError: for other runs. FileNotFoundError: see :func:`load_run`.
    """
    student, _, _ = load_run(run_dir)
    if student.activations != "folded":
        raise ValueError(f"{str(run_dir)!r} has {student.activations} activations: nothing was folded")
    return _calibrated_as(student.prepared(student.card.build()), Path(run_dir))


def _calibrated_as(prepared: nn.Module, folder: Path) -> nn.Module:
    prepared.load_state_dict(read_state_dict(folder / "calibrated.safetensors"))
    return prepared.eval()
