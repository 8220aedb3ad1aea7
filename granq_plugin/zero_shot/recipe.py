"""Zero-shot QAT: :func:`zero_shot_qat`."""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from granq_plugin.modules import check_module, is_quantized
from granq_plugin.zero_shot import parallel
from granq_plugin.zero_shot.config import ZeroShotConfig
from granq_plugin.zero_shot.generator import Generator
from granq_plugin.zero_shot.graphs import check_device
from granq_plugin.zero_shot.run_directory import RunDirectory
from granq_plugin.zero_shot.statistics import batch_norm_layers
from granq_plugin.zero_shot.training import Training, learned_scales

__all__ = ["ZeroShotResult", "zero_shot_qat"]

CHECKPOINT_SECONDS = 60
"""The most that an interrupted run loses, give or take an iteration."""


@dataclass(frozen=True)
class ZeroShotResult:
    """What :func:`zero_shot_qat` returns.

    Attributes:
        student: the network that was given, trained, in evaluation mode.
        generator: the trained generator; None where images were given.
        metrics: one dict per epoch, the lines of ``metrics.csv``.
        images: the memory's synthetic images ``[N, C, S, S]``, normalized, float16, on the CPU; empty without a memory.
    """
    student: nn.Module
    generator: Generator | None
    metrics: list[dict]
    images: Tensor

    def __repr__(self) -> str:
        last = dict(self.metrics[-1]) if self.metrics else {}
        iterations, rest = last.pop("iterations", 0), ", ".join(f"{k} {v:.4g}" for k, v in last.items())
        return (f"ZeroShotResult of {iterations} iterations, {'without' if self.generator is None else 'with'} a generator\n"
                f"  last metrics: {rest or 'none'}\n  images: {len(self.images)}")


def zero_shot_qat(
        student: nn.Module,
        teacher: nn.Module,
        config: ZeroShotConfig,
        *,
        images: Tensor | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        evaluate: Callable[[nn.Module], float] | None = None,
        evaluate_every: int = 1,
        on_start: Callable[[], object] | None = None,
        on_iteration: Callable[[int, dict[str, Tensor]], object] | None = None,
        on_epoch: Callable[[dict], object] | None = None) -> ZeroShotResult:
    """Train a quantized student to behave like its float teacher, without data (arXiv 2503.18339).

    A generator learns images that match the teacher's BatchNorm statistics and on which student and teacher differ; the student
    learns from the teacher on them. The student's BatchNorm layers keep the teacher's statistics. Static quantizers
    (:class:`GranQActPerChannelStatic`) that are not frozen yet follow the student and freeze after ``config.range_epochs``;
    learned scales learn from then on.

    Args:
        student: what :func:`granq_plugin.quantize` makes of the teacher, or any Brevitas network of the same classes; trained in
            place, on its device.
        teacher: float network with BatchNorm layers, on the same device. It runs in evaluation mode, whatever its own mode is, and
            is left as it was: mode, statistics, parameters and their ``requires_grad``.
        images: ``[N, C, S, S]``, normalized as the network's input: train on these instead of a generator's, e.g. the images of
            another student's run. There is then no warm-up, and an iteration is one student step.
        run_dir: folder for ``config.toml``, ``run.json``, ``metrics.csv`` and ``checkpoint.pt`` (every
            ``config.checkpoint_every`` iterations, and every minute).
        resume: go on from the checkpoint in run_dir; on the CPU, bit-identical to a run that was never interrupted.
        evaluate: called on the student (in evaluation mode) every ``evaluate_every`` epochs and after the last; its number is the
            metric ``accuracy``. It does not influence training.
        on_start: called when everything is checked and run_dir is open, before anything is trained.
        on_iteration: called with the number of iterations done and the iteration's scalars (tensors: reading one waits for a GPU).
        on_epoch: called with each epoch's metrics; nothing is printed without it.

    Returns:
        :class:`ZeroShotResult`.

    Raises:
        ValueError, TypeError: before training, for a teacher without BatchNorm statistics, a student or number of classes that does
            not match, an image size that the teacher cannot take, images of another shape. FileExistsError, OSError: see
            :class:`RunDirectory`.

    Example:
        >>> from granq_plugin import quantize
        >>> from granq_plugin.zero_shot import preset, zero_shot_qat
        >>> teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
        >>> student = quantize(teacher, weight_bit_width=3, act_bit_width=3)
        >>> config = preset("cifar10", image_size=8, epochs=2, iterations=3, warmup_epochs=1)
        >>> result = zero_shot_qat(student, teacher, config, on_epoch=lambda row: print(row["epoch"], "of", config.epochs))
        1 of 2
        2 of 2
        >>> sorted(result.metrics[-1])
        ['agreement', 'epoch', 'images_per_second', 'iterations', 'loss_bn', 'loss_generator', 'loss_student', 'lr']
    """
    for network in (student, teacher):
        check_module(network)
    if evaluate and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, got {evaluate_every!r}")
    modes = {m: m.training for m in teacher.modules()}
    trainable = {p: p.requires_grad for p in teacher.parameters()}
    training, stack = None, ExitStack()
    try:
        teacher.eval().requires_grad_(False)
        _check(student, teacher, config, images)
        directory = None
        if run_dir is not None:
            directory = stack.enter_context(RunDirectory(run_dir, config, dict(teacher=teacher, student=student), resume))
        if on_start:
            on_start()
        with directory.checkpoint() if directory else nullcontext() as state:
            if state is not None:
                student.load_state_dict(state["student"])
            training = Training(student, teacher, config, images)
            if state is not None:
                training.load_state(state)
        saved = time.monotonic()
        while training.iteration < config.total_iterations:
            log = training.step()
            if on_iteration:
                on_iteration(training.iteration, log)
            last = training.iteration == config.total_iterations
            if training.iteration % config.iterations == 0:
                row = training.end_epoch()
                if evaluate and (last or row["epoch"] % evaluate_every == 0):
                    row["accuracy"] = training.evaluate(evaluate)
                if directory:
                    directory.save_metrics(training.metrics)
                if on_epoch:
                    on_epoch(row)
            late = time.monotonic() - saved > CHECKPOINT_SECONDS
            if directory and (last or late or training.iteration % config.checkpoint_every == 0):
                directory.save_checkpoint(training.state())
                saved = time.monotonic()
    finally:
        stack.close()
        if training is not None:
            training.close()
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
    return ZeroShotResult(student, training.generator, training.metrics, training.memory.images())


def _check(student: nn.Module, teacher: nn.Module, config: ZeroShotConfig, images: Tensor | None) -> None:
    """Raise for what cannot be trained, before anything is."""
    if not isinstance(config, ZeroShotConfig):
        raise TypeError(f"config must be a ZeroShotConfig, got {type(config).__name__}")
    for network, expected, found in ((teacher, False, "the second has"), (student, True, "the first has no")):
        if is_quantized(network) != expected:
            raise ValueError("the first network is the quantized student, the second its float teacher; here "
                             f"{found} Brevitas quantizers")
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters() if p.numel()}
    if shared:
        raise ValueError("student and teacher share parameters: quantize a copy of the teacher (inplace=False)")
    if not any(p.requires_grad and p.numel() for p in student.parameters()):
        raise ValueError("the student has no parameter to train: all have requires_grad=False")
    if images is None:
        batch_norm_layers(teacher)
    shape = (config.image_channels, config.image_size, config.image_size)
    if not isinstance(images, Tensor | None):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images is not None and (images.shape[1:] != shape or not images.is_floating_point() or not len(images)):
        raise ValueError(f"images must be float [N, {', '.join(map(str, shape))}], got {images.dtype} {list(images.shape)}")
    if config.batch_size % (config.accumulation_steps * parallel.world_size()):
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of accumulation_steps x ranks = "
                         f"{config.accumulation_steps} x {parallel.world_size()}")
    like = next(teacher.parameters())
    own = next(student.parameters())
    for attribute in ("device", "dtype"):
        a, b = (getattr(p, attribute) for p in (own, like))
        if a != b:
            raise ValueError(f"student and teacher must have one {attribute}; theirs are {a} and {b}")
    if config.augments and images is None and not config.replay_steps:
        raise ValueError("image_gain, image_shift and image_flip change images from the memory: give images, or a memory_size and "
                         "replay_steps")
    if config.scale_headroom != 1 and not learned_scales(student):
        raise ValueError(f"scale_headroom={config.scale_headroom:g} is for learned scales, and the student has none: "
                         "GranQActPerChannelStatic.let(learned_scale=True)")
    if config.compile == "cudagraphs":
        check_device(like.device, "teacher", parallel.world_size())
    with torch.no_grad():
        try:
            logits = teacher(torch.zeros(2, *shape, device=like.device, dtype=like.dtype))
        except (RuntimeError, ValueError) as e:
            raise ValueError(f"the teacher cannot run on images of {'x'.join(map(str, shape))}: {str(e).splitlines()[0]}") from e
    if logits.shape != (2, config.num_classes):
        raise ValueError(f"num_classes is {config.num_classes}, but the teacher's output for 2 images is {list(logits.shape)}")
