"""Zero-shot QAT of a zoo network, from its description to a run's folder: :func:`train_student`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from granq_plugin.atomic import write_text
from granq_plugin.zero_shot import ZeroShotConfig, ZeroShotResult, parallel, zero_shot_qat
from granq_plugin.zero_shot.outcome import save_outcome, save_tensors
from zoo.card import Card
from zoo.data import ImageSet
from zoo.evaluate import check_images, evaluate
from zoo.quantization import Quantization
from zoo.registry import get_card, list_models
from zoo.students import calibrator
from zoo.weights import read_state_dict

__all__ = ["StudentRun", "read_images", "train_student"]


@dataclass(frozen=True)
class StudentRun:
    """A finished run.

    Attributes:
        result: of :func:`granq_plugin.zero_shot.zero_shot_qat`; the network is on the device that it was trained on.
        summary: what was added to ``run.json``.
    """
    result: ZeroShotResult
    summary: dict

    @property
    def metrics(self) -> list[dict]:
        return self.result.metrics


def train_student(
        card: Card,
        quantization: Quantization,
        teacher: nn.Module,
        config: ZeroShotConfig,
        run_dir: str | Path,
        *,
        teacher_sha256: str,
        images: Tensor | None = None,
        images_sha256: str | None = None,
        test_set: ImageSet | None = None,
        evaluate_every: int | None = None,
        resume: bool = False,
        device: torch.device | str = "cpu",
        on_iteration: Callable[[int, dict], object] | None = None,
        on_epoch: Callable[[dict], object] | None = None,
        on_float_top1: Callable[[float], object] | None = None) -> StudentRun:
    """Quantize a float zoo network, train it without data, and leave a run that :func:`zoo.students.load_run` reads.

    Args:
        card: of the float network. quantization: of the student. teacher: the float network, on the CPU; it is moved to ``device``.
        run_dir: see :func:`granq_plugin.zero_shot.zero_shot_qat`; its outcome is written too, by rank 0.
        teacher_sha256, images_sha256: of the files of weights and images, for ``run.json``.
        images: normalized ``[N, C, S, S]`` of another run: train on these. Folded students need them, for their ranges.
        test_set: evaluated every ``evaluate_every`` epochs (None: at the end); training never sees it.
        resume, on_iteration, on_epoch: see :func:`granq_plugin.zero_shot.zero_shot_qat`; a finished run that is resumed only
            writes its outcome again.
        on_float_top1: called by rank 0, before training, with the float network's accuracy on the test set, in percent.

    Raises:
        ValueError, TypeError, OSError: see :func:`granq_plugin.zero_shot.zero_shot_qat`; ValueError also for a folded student
            without images, and for a test set that the network cannot take.
    """
    if test_set is not None:
        check_images(test_set, card.preprocessing)
    calibrated = {}  # a folded network is rebuilt from what it was folded from

    def calibrate(prepared: nn.Module) -> nn.Module:
        if images is None:
            raise ValueError("folded activations need images, for ranges to fold")
        prepared = calibrator(images.float().split(250)[:8])(prepared)
        calibrated.update({k: v.clone() for k, v in prepared.state_dict().items() if isinstance(v, Tensor)})
        return prepared

    def deployed(network: nn.Module) -> nn.Module:
        return quantization.deployed(network, card.example_input())

    def top1(network: nn.Module) -> float:
        return evaluate(network, test_set, card.preprocessing, device=device).top1

    float_top1 = None

    def on_start() -> None:
        nonlocal float_top1
        if test_set and parallel.rank() == 0:
            float_top1 = top1(teacher)
            if on_float_top1 is not None:
                on_float_top1(float_top1)

    network = quantization.build(teacher, card.example_input(), calibrate)
    result = zero_shot_qat(
        network.to(device), teacher.to(device), config, images=images, run_dir=run_dir, resume=resume,
        evaluate=(lambda trained: top1(deployed(trained))) if test_set else None, evaluate_every=evaluate_every or config.epochs,
        on_start=on_start, on_iteration=on_iteration, on_epoch=on_epoch)
    in_zoo = card.name in list_models() and get_card(card.name) == card
    summary = dict(network=card.name if in_zoo else "card.toml") | asdict(quantization) | dict(
        dataset=card.dataset, teacher_weights_sha256=teacher_sha256, images_sha256=images_sha256)
    if parallel.rank() == 0:
        if test_set:
            summary |= dict(test_images=len(test_set), float_top1=float_top1, top1=result.metrics[-1]["accuracy"])
        if not in_zoo:
            write_text(Path(run_dir) / "card.toml", card.to_toml())
        if calibrated:
            save_tensors(Path(run_dir) / "calibrated.safetensors", calibrated)
        outcome = replace(result, student=deployed(result.student))
        save_outcome(run_dir, outcome, summary, card.preprocessing.mean, card.preprocessing.std)
    return StudentRun(result, summary)


def read_images(path: str | Path) -> Tensor:
    """The images of a finished run, ``images.safetensors``: normalized, float16, ``[N, C, S, S]``.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it holds no images.
    """
    images = read_state_dict(path, "file of images").get("images")
    if images is None:
        raise ValueError(f"{str(path)!r} holds no tensor 'images'")
    return images
