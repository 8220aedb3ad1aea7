"""One iteration of the published loop, without its waste.

The published loop runs the student twice on the same images with the same weights (once for the generator, once for itself),
computes weight gradients that it throws away, and gathers batch statistics in passes of their own. Here one forward of generator,
teacher and student serves both losses, and each backward computes what its optimizer uses. The mathematics is unchanged:
``benchmarks/published_loop.py`` is the loop as published, and the gradients agree (tests, float64, rtol 1e-9).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from granq_plugin.zero_shot import losses, parallel
from granq_plugin.zero_shot.config import ZeroShotConfig
from granq_plugin.zero_shot.features import FeaturePairs
from granq_plugin.zero_shot.statistics import BatchNormStatistics

__all__ = ["ObservedTeacher", "StepResult", "generator_loss", "generator_step", "low_pass", "student_step"]


class ObservedTeacher(nn.Module):
    """A frozen teacher that returns its logits and the BatchNorm loss of the same pass."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.statistics = BatchNormStatistics(teacher)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.teacher(images)
        return logits, losses.bn_statistics_loss(self.statistics.take())


@dataclass(frozen=True)
class StepResult:
    """What a step computed; nothing has been updated.

    Attributes:
        images, teacher_logits: detached. generator_grads, student_grads: in the order of the parameters; empty if not asked for.
        log: scalars without gradient, by name; ``loss_student`` is counted from its least value, ``-T^2 ln(classes)``.
    """
    images: Tensor
    teacher_logits: Tensor
    generator_grads: Sequence[Tensor]
    student_grads: Sequence[Tensor]
    log: dict[str, Tensor]

    def copied(self) -> "StepResult":
        """The same values in memory of their own."""
        return StepResult(
            self.images.clone(), self.teacher_logits.clone(), [g.clone() for g in self.generator_grads],
            [g.clone() for g in self.student_grads], {name: v.clone() for name, v in self.log.items()})


def generator_loss(t: Tensor, q: Tensor, y: Tensor, bn_loss: Tensor, config: ZeroShotConfig) -> Tensor:
    """L_G of images with labels y: margins, dis- and agreement, BatchNorm statistics (method: AdaDFQ)."""
    floor = parallel.least(losses.entropy((t - q).detach()).amin())
    return (losses.margin_loss(t, q, config.lambda_lower, config.lambda_upper, floor)
            + config.beta * (config.alpha_disagreement * losses.disagreement_loss(t, q, y)
                             + config.alpha_agreement * losses.agreement_loss(t, q, y))
            + config.gamma * bn_loss)


def generator_step(
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        noise: Tensor,
        labels: Tensor,
        generator_params: Sequence[nn.Parameter],
        student_params: Sequence[nn.Parameter],
        config: ZeroShotConfig,
        features: FeaturePairs | None = None) -> StepResult:
    """Gradients of both losses from one forward of the three networks.

    Args:
        teacher: an :class:`ObservedTeacher`. noise, labels: ``[B, latent_dim]`` and ``[B]`` of this rank.
        generator_params, student_params: gradients are taken for these; no student_params in the warm-up.
        features: between these networks; their loss joins the student's.
    """
    with _autocast(noise, config):
        images = generator(noise, labels)
        if config.low_pass:
            images = low_pass(images, config.low_pass)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        t, bn_loss = teacher(images)
        q = student(images)
    t, q = _wide(t), _wide(q)
    loss = generator_loss(t, q, labels, bn_loss, config)
    generator_grads = torch.autograd.grad(loss, generator_params, retain_graph=bool(student_params))
    distillation = losses.student_loss(t, q, config.temperature)
    student_grads = _gradients(_with_features(distillation, features, config), student_params)
    log = dict(loss_generator=loss.detach(), loss_bn=bn_loss.detach(), **_student_log(distillation, t, q, config))
    return StepResult(images.detach(), t.detach(), generator_grads, student_grads, log)


def student_step(
        student: nn.Module,
        images: Tensor,
        teacher_logits: Tensor | None,
        student_params: Sequence[nn.Parameter],
        config: ZeroShotConfig,
        features: FeaturePairs | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None) -> StepResult:
    """Gradients of the student's loss on given images.

    Args:
        teacher_logits: of these images, if they are known. teacher: from images to logits; needed if they are not, and for
            ``features``.
    """
    with _autocast(images, config):
        if features or teacher_logits is None:
            with torch.no_grad():
                t = teacher(images)
        q = _wide(student(images))
    teacher_logits = _wide(t) if teacher_logits is None else teacher_logits
    distillation = losses.student_loss(teacher_logits, q, config.temperature)
    log = _student_log(distillation, teacher_logits, q, config)
    return StepResult(
        images, teacher_logits, (), _gradients(_with_features(distillation, features, config), student_params), log)


def _with_features(distillation: Tensor, features: FeaturePairs | None, config: ZeroShotConfig) -> Tensor:
    return distillation if features is None else distillation + config.feature_weight * features.take()


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    """Gaussian low-pass filter over the two spatial axes (SynQ, ICLR 2025): amplitudes times ``exp(-f^2 / (2 cutoff^2))``.

    Args:
        images: ``[B, C, H, W]``. cutoff: in cycles per image, above 0.
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=wide.device, dtype=wide.dtype)
    columns = torch.fft.rfftfreq(width, 1 / width, device=wide.device, dtype=wide.dtype)
    gains = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * cutoff**2))
    return torch.fft.irfft2(torch.fft.rfft2(wide) * gains, s=(height, width)).to(images.dtype)


def _student_log(distillation: Tensor, t: Tensor, q: Tensor, config: ZeroShotConfig) -> dict[str, Tensor]:
    """The student's loss counted from its least value, which would hide it, and the agreement."""
    least = -config.temperature**2 * math.log(t.shape[-1])
    return dict(loss_student=distillation.detach() - least, agreement=losses.teacher_agreement(t, q))


def _gradients(loss: Tensor, params: Sequence[nn.Parameter]) -> Sequence[Tensor]:
    """Gradients, zero where the loss does not depend on a parameter."""
    if not params:
        return ()
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]


def _autocast(x: Tensor, config: ZeroShotConfig):
    return torch.autocast(x.device.type, torch.bfloat16, enabled=config.bf16)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
