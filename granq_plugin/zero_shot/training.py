"""The state of a run: networks, optimizers, random numbers, metrics; and how one iteration changes it."""

import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from granq_plugin.core.static import StaticGranQ
from granq_plugin.fusion import fuse_batch_norm
from granq_plugin.zero_shot import parallel
from granq_plugin.zero_shot.augmentation import random_crop_flip, random_gain
from granq_plugin.zero_shot.config import ZeroShotConfig
from granq_plugin.zero_shot.features import FeaturePairs
from granq_plugin.zero_shot.generator import Generator
from granq_plugin.zero_shot.graphs import RecordedStep
from granq_plugin.zero_shot.memory import ImageMemory
from granq_plugin.zero_shot.step import ObservedTeacher, StepResult, generator_step, student_step
from granq_plugin.zero_shot.weights import WeightAverage, at_sharpest_neighbour, load_optimizer

__all__ = ["Training", "learned_scales", "update_parameters"]


class Training:
    """Everything that a checkpoint holds; networks are trained in place.

    Attributes:
        networks: the observed teacher, the student and the generator (or None) as they run: fused or compiled, with the parameters
            of the plain ones.

    Args:
        student, teacher, config, images: see :func:`granq_plugin.zero_shot.zero_shot_qat`; the teacher is frozen and in
            evaluation mode. To go on from a checkpoint, the student has its state already, for Brevitas's proxies build new
            quantizers as they load; :meth:`load_state` brings the rest.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, config: ZeroShotConfig, images: Tensor | None) -> None:
        self.config = config
        self.student = student
        self.like = next(student.parameters()).detach()
        self.rng = torch.Generator().manual_seed(config.seed)
        self.generator = _new_generator(config).to(self.like) if images is None else None
        self.memory = ImageMemory(config.memory_size, self.like.device)
        self.iteration = 0
        self.metrics: list[dict] = []
        self._sums: dict[str, Tensor] = {}
        self._started = time.perf_counter()
        self._static = [m for m in student.modules() if isinstance(m, StaticGranQ) and not m.scaling_impl.frozen]
        for quantizer in self._static:  # this run decides when they freeze
            quantizer.scaling_impl.collect_stats_steps = sys.maxsize
        self.freeze_at = self.first_student_iteration + config.iterations * (
            config.range_epochs or max(1, (config.epochs - (config.warmup_epochs if self.generator else 0)) // 2))
        self.optimizer = _student_optimizer(student, config)
        self.average = WeightAverage(_params(self.optimizer), config.ema_decay) if config.ema_decay else None
        self.generator_optimizer = None if self.generator is None else torch.optim.Adam(
            self.generator.parameters(), config.generator_lr, config.betas, fused=_fused(self.generator))
        if images is not None:
            self._fill(images, teacher)
        # what close() takes back comes last, when nothing can fail any more
        self.features = None if config.feature_loss == "off" else FeaturePairs(teacher, student, config.feature_loss)
        self.observed = ObservedTeacher(teacher) if images is None else None
        # an observed teacher takes the statistics of each of its passes: none is left for the next one
        self.teacher = teacher if self.observed is None else lambda x: self.observed(x)[0]
        self._recorded: dict[str, RecordedStep] = {}
        self.networks = [self.observed, student, self.generator]
        if config.compile == "default":
            torch._functorch.config.donated_buffer = False  # the student's graph is walked twice
            self.networks = [None if m is None else torch.compile(m) for m in self.networks]
        else:
            self.networks[1] = fuse_batch_norm(student.eval())

    @property
    def first_student_iteration(self) -> int:
        return self.config.warmup_epochs * self.config.iterations if self.generator else 0

    def _warmup_factor(self) -> float:
        done = self.iteration - self.first_student_iteration + 1
        return max(0.0, min(1.0, done / max(1, self.config.student_lr_warmup)))

    def step(self) -> dict[str, Tensor]:
        """One iteration; returns its scalars."""
        config = self.config
        self._set_modes()
        student_lr = config.student_lr * self._warmup_factor()
        for optimizer, lr in ((self.optimizer, student_lr), (self.generator_optimizer, config.generator_lr)):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = lr * config.lr_factor(self.iteration) * (config.scale_lr_factor if group.get("scales") else 1)
        trains_student = self.iteration >= self.first_student_iteration
        log = self._generator_iteration(trains_student) if self.generator else {}
        if trains_student:
            for _ in range(config.replay_steps if self.generator else 1):
                log = {**self._memory_iteration(), **log}
        self.iteration += 1
        for name, value in log.items():
            self._sums[name] = self._sums.get(name, 0) + value
        return log

    def _generator_iteration(self, trains_student: bool) -> dict[str, Tensor]:
        config = self.config
        noise = torch.randn(config.batch_size, config.latent_dim, generator=self.rng).to(self.like.dtype)
        labels = torch.randint(config.num_classes, (config.batch_size, ), generator=self.rng)
        params = list(self.generator.parameters())
        student_params = self._student_params() if trains_student else []

        def step(z: Tensor, y: Tensor) -> StepResult:
            teacher, student, generator = self.networks
            return generator_step(teacher, student, generator, z, y, params, student_params, config, self.features)

        results = []
        for z, y in zip(noise.chunk(config.accumulation_steps), labels.chunk(config.accumulation_steps)):
            z, y = (parallel.shard(v).to(self.like.device, non_blocking=True) for v in (z, y))
            results.append(self._run("both" if trains_student else "generator", step, z, y))
        update_parameters(self.generator_optimizer, params, _mean_grads([r.generator_grads for r in results]))
        if trains_student:
            self._update_student(student_params, results)
        for r in results:
            self.memory.add(parallel.gather(r.images), parallel.gather(r.teacher_logits))
        return _mean_log(results)

    def _memory_iteration(self) -> dict[str, Tensor]:
        config, params, results = self.config, self._student_params(), []
        for _ in range(config.accumulation_steps):
            x, t = self.memory.draw(config.batch_size // config.accumulation_steps, self.rng)
            x = x.to(self.like.dtype)
            if config.augments:  # the global batch, so that it does not depend on the number of ranks
                x, t = self._augmented(x), None
            x, t = parallel.shard(x), None if t is None else parallel.shard(t)
            if config.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            results.append(self._student_step(x, t, params))
        self._update_student(params, results)
        return _mean_log(results)

    def _augmented(self, images: Tensor) -> Tensor:
        config = self.config
        if config.image_shift or config.image_flip:
            images = random_crop_flip(images, config.image_shift, config.image_flip, self.rng)
        return random_gain(images, config.image_gain, self.rng) if config.image_gain > 1 else images

    def _student_step(self, images: Tensor, teacher_logits: Tensor | None, params: list[nn.Parameter]) -> StepResult:
        """Without their logits, the teacher answers to the images first."""
        def step(x: Tensor, t: Tensor | None = None) -> StepResult:
            return student_step(self.networks[1], x, t, params, self.config, self.features, self.teacher)

        if teacher_logits is None:
            return self._run("teacher and student", step, images)
        return self._run("student", step, images, teacher_logits)

    def _run(self, name: str, step: Callable[..., StepResult], *inputs: Tensor) -> StepResult:
        """``step(*inputs)``; where CUDA graphs are asked for, recorded under its name, once static ranges no longer move."""
        if self.config.compile != "cudagraphs" or self._ranges_move:
            return step(*inputs)
        if name not in self._recorded:
            self._recorded[name] = RecordedStep(step)
        result = self._recorded[name](*inputs)
        return result.copied() if self.config.accumulation_steps > 1 else result

    def _update_student(self, params: list[nn.Parameter], results: list[StepResult]) -> None:
        grads = _mean_grads([r.student_grads for r in results])
        if self.config.sam_rho:
            with at_sharpest_neighbour(params, grads, self.config.sam_rho):
                grads = _mean_grads([self._student_step(r.images, r.teacher_logits, params).student_grads for r in results])
        update_parameters(self.optimizer, params, grads)
        if self.average:
            self.average.update()

    def _student_params(self) -> list[nn.Parameter]:
        """A learned scale has no elements until it starts to learn."""
        return [p for p in _params(self.optimizer) if p.numel()]

    def _set_modes(self) -> None:
        """The student in evaluation mode (the teacher's BatchNorm statistics stay), but for static ranges that still move."""
        self.student.eval()
        if self.generator:
            self.generator.train()
        for quantizer in self._static:
            quantizer.train(self._ranges_move)
            if not self._ranges_move:
                quantizer.init_scale()

    @property
    def _ranges_move(self) -> bool:
        return bool(self._static) and self.iteration < self.freeze_at

    def end_epoch(self) -> dict:
        """The epoch's metrics so far; the caller may add to them.

        Raises:
            FloatingPointError: if one of them is not finite: training has diverged.
        """
        now, config = time.perf_counter(), self.config
        sums = list(self._sums.values())
        parallel.average_(sums)
        means = {name: float(value) / config.iterations for name, value in zip(self._sums, sums)}
        row = dict(epoch=self.iteration // config.iterations, iterations=self.iteration,
                   lr=self.optimizer.param_groups[0]["lr"], **means,
                   images_per_second=config.iterations * config.batch_size / (now - self._started))
        bad = [name for name in means if not math.isfinite(means[name])]
        if bad:
            raise FloatingPointError(
                f"training diverged in epoch {row['epoch']}: {bad[0]} is {means[bad[0]]}; lower student_lr={config.student_lr:g} "
                f"or raise student_lr_warmup={config.student_lr_warmup}")
        self.metrics.append(row)
        self._sums, self._started = {}, now
        return row

    def state(self) -> dict:
        """What a checkpoint holds: tensors and plain values."""
        return dict(
            iteration=self.iteration, student=self.student.state_dict(), optimizer=self.optimizer.state_dict(),
            generator=self.generator.state_dict() if self.generator else None,
            generator_optimizer=self.generator_optimizer.state_dict() if self.generator else None,
            average=self.average.state() if self.average else None, rng=self.rng.get_state(),
            memory=self.memory.state() if self.generator else None, metrics=self.metrics,
            sums=self._sums)

    def load_state(self, state: dict) -> None:
        """What :meth:`state` gave, all but the student. Raises a ValueError, or others, for what is damaged."""
        self.iteration, self.metrics = state["iteration"], state["metrics"]
        if self.iteration not in range(self.config.total_iterations + 1):
            raise ValueError(f"it is of iteration {self.iteration!r} of {self.config.total_iterations}")
        if len(self.metrics) != self.iteration // self.config.iterations:
            raise ValueError(f"it has metrics of {len(self.metrics)} epochs in iteration {self.iteration}")
        load_optimizer(self.optimizer, state["optimizer"])
        if self.generator:
            self.generator.load_state_dict(state["generator"])
            load_optimizer(self.generator_optimizer, state["generator_optimizer"])
            size = self.config.image_size
            self.memory.load_state(state["memory"], (self.config.image_channels, size, size), self.config.num_classes)
        if self.average:
            self.average.load_state(state["average"])
        self.rng.set_state(state["rng"])
        self._sums = {k: v.to(self.like.device) for k, v in state["sums"].items()}

    def evaluate(self, function: Callable[[nn.Module], float]) -> float:
        """``function`` of the student as it would be deployed now; on one rank, the others get its number."""
        before = self._deploy()
        try:
            return parallel.from_first_rank(lambda: float(function(self.student)))
        finally:
            for scale, value in before:
                scale.data.copy_(value)
            if self.average:
                self.average.swap()

    def _deploy(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Make the student what is deployed; returns learned scales and what they were. The average has changed places."""
        self.student.eval()
        if self.average:
            self.average.swap()
        scales = learned_scales(self.student)
        before = [(scale, scale.detach().clone()) for scale in scales]
        for scale in scales:
            scale.data.mul_(self.config.scale_headroom)
        return before

    def close(self) -> None:
        """Leave the student as it is deployed, in evaluation mode, and both networks without hooks."""
        self._deploy()
        if self.features:
            self.features.remove()
        if self.observed:
            self.observed.statistics.remove()

    def _fill(self, images: Tensor, teacher: nn.Module) -> None:
        self.memory = ImageMemory(len(images), self.like.device)
        with torch.no_grad():
            for batch in images.split(250):
                x = batch.to(torch.float16)  # as the student will see them
                if self.config.augments:  # answered when they are drawn and changed
                    self.memory.add(x, torch.empty(len(x), 0))
                else:
                    self.memory.add(x, teacher(x.to(self.like.device, self.like.dtype)).float())


def _new_generator(config: ZeroShotConfig) -> Generator:
    """The same weights for the same seed, whatever torch's global random state is, which stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Generator(config.image_size, config.num_classes, config.latent_dim, config.image_channels, config.channels_last)


def _params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def learned_scales(student: nn.Module) -> list[nn.Parameter]:
    """Of static activations; without elements until they start to learn."""
    return [m.learned_scale for m in student.modules() if isinstance(m, StaticGranQ) and m.learned_scale is not None]


def _student_optimizer(student: nn.Module, config: ZeroShotConfig) -> torch.optim.Optimizer:
    """SGD as published, or AdamW; learned scales are not decayed."""
    scales = [p for p in learned_scales(student) if p.requires_grad]
    known = set(scales)
    others = [p for p in student.parameters() if p.requires_grad and p not in known]
    groups = [dict(params=others, weight_decay=config.weight_decay)] + (
        [dict(params=scales, weight_decay=0.0, scales=True)] if scales else [])
    if config.student_optimizer == "adam":
        return torch.optim.AdamW(groups, config.student_lr, fused=_fused(student))
    return torch.optim.SGD(groups, config.student_lr, config.momentum, nesterov=config.momentum > 0, fused=_fused(student))


def _fused(network: nn.Module) -> bool | None:
    """On CPU one pass over the parameters instead of one for each operation; on a GPU what torch chooses."""
    return next(network.parameters()).is_cpu or None


def _mean_grads(grads: list[Sequence[Tensor]]) -> list[Tensor]:
    """The mean of the micro-batches' and the ranks' gradients."""
    means = [g[0] if len(g) == 1 else torch.stack(g).mean(0) for g in zip(*grads)]
    parallel.average_(means)
    return means


def update_parameters(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
    """A step of the optimizer with these gradients."""
    for p, g in zip(params, grads):  # torch's fused optimizers walk through memory: p and g must lie in it alike
        p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
    optimizer.step()
    optimizer.zero_grad()


def _mean_log(results: list[StepResult]) -> dict[str, Tensor]:
    """Scalars as means over micro-batches (of this rank)."""
    return {name: torch.stack([r.log[name] for r in results]).mean() for name in results[0].log}
