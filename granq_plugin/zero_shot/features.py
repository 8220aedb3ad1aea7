"""Distillation of what lies between input and logits: the outputs of the BatchNorm layers that student and teacher share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granq_plugin.zero_shot.statistics import batch_norm_layers

__all__ = ["FEATURE_LOSSES", "FeaturePairs", "attention_loss", "feature_loss"]


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features ``[B, C, *spatial]``, relative to the teacher's mean square."""
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(torch.finfo(teacher.dtype).tiny)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of attention maps (mean square over channels, normalized over space;
    arXiv 1612.03928)."""
    maps = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(1).mean()


FEATURE_LOSSES = {"features": feature_loss, "attention": attention_loss}


class FeaturePairs:
    """Hooks on every BatchNorm layer of the teacher and the student's layer of the same name.

    A layer of the student may have a buffer ``output_scale``, ``[C]``, the real value of its output's unit, as folding leaves it
    (:func:`granq_plugin.deploy.fold`): features are compared in real values.

    Raises:
        ValueError: if the student lacks one of them.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, kind: str) -> None:
        self._loss = FEATURE_LOSSES[kind]
        layers = set(batch_norm_layers(teacher))
        names = [name for name, m in teacher.named_modules() if m in layers]
        own = dict(student.named_modules())
        lacking = [name for name in names if name not in own]
        if lacking:
            raise ValueError(f"feature_loss={kind!r} compares BatchNorm layers by name, and the student has no {lacking[0]!r}")
        self._seen: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}
        self._handles = [
            layer.register_forward_hook(self._recorder(who, name))
            for name in names for who, layer in (("teacher", teacher.get_submodule(name)), ("student", own[name]))]

    def _recorder(self, who: str, name: str):
        def record(layer, inputs, output) -> None:
            scale = getattr(layer, "output_scale", None)
            self._seen[who][name] = output if scale is None else output * scale.view(-1, *[1] * (output.dim() - 2))
        return record

    def take(self) -> Tensor:
        """The loss of the last pass of both, a scalar; no gradient reaches the teacher."""
        teacher, student = self._seen["teacher"], self._seen["student"]
        self._seen = {"teacher": {}, "student": {}}
        wide = torch.promote_types(next(iter(student.values())).dtype, torch.float32)
        return torch.stack([self._loss(student[name].to(wide), t.detach().to(wide)) for name, t in teacher.items()]).mean()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
