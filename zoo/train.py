"""Float teachers from labelled images: SGD with one cosine cycle, augmentation on tensors, growing image sizes."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granq_plugin.settings import Settings, setting
from granq_plugin.zero_shot.augmentation import random_crop_flip
from granq_plugin.zero_shot.graphs import RecordedStep, check_device
from granq_plugin.zero_shot.run_directory import RunDirectory
from granq_plugin.zero_shot.training import update_parameters
from granq_plugin.zero_shot.weights import load_optimizer
from zoo.card import Preprocessing
from zoo.data import ImageSet

__all__ = ["TRAIN_PRESETS", "TrainConfig", "train_preset", "train_teacher"]


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of :func:`train_teacher`; ``granq train-teacher --help-config`` prints them.

    Raises:
        TypeError, ValueError: at construction, naming the field, the value and what is allowed.
    """

    epochs: int = setting(60, "passes over the training images", least=1)
    batch_size: int = setting(128, "images of a step", least=2, most=2**16)
    lr: float = setting(0.15, "highest learning rate (SGD, Nesterov)", above=0)
    lr_warmup: float = setting(0.1, "share of the steps in which lr is reached; then it falls as a cosine", least=0, most=0.9)
    momentum: float = setting(0.9, "of SGD", least=0, most=0.999)
    weight_decay: float = setting(4e-4, "of the convolutions and linear layers; BatchNorm and biases have none", least=0)
    label_smoothing: float = setting(0.0, "of the cross-entropy", least=0, most=0.9)
    crop_padding: int = setting(4, "zero pixels around an image before the random crop; 0: no crop", least=0, most=2**10)
    flip: bool = setting(True, "mirror every second image, at random")
    start_size: int = setting(0, "image size of the first epoch, growing to the network's; 0: no growth", least=0, most=2**12)
    grow_until: float = setting(0.65, "share of the epochs after which images have their full size", least=0, most=1)
    seed: int = setting(0, "of the weights, the order and the augmentation", least=0)
    bf16: bool = setting(True, "autocast the network to bfloat16; loss and weights stay float32")
    channels_last: bool = setting(True, "run the convolutions in channels_last layout")
    compile: str = setting("off", "cudagraphs: a step is recorded once for each image size and launched as one (GPU)",
                           choices=("off", "cudagraphs"))

    def lr_factor(self, done: float) -> float:
        """What ``lr`` is multiplied by when a share ``done``, 0 to 1, of the steps has been made."""
        if done < self.lr_warmup:
            return done / self.lr_warmup
        return 0.5 * (1 + math.cos(math.pi * (done - self.lr_warmup) / (1 - self.lr_warmup)))

    def size_in(self, epoch: int, full: int) -> int:
        """Height and width of the images in an epoch (from 0): a multiple of 4 that grows linearly up to ``full``."""
        growing = self.grow_until * self.epochs
        if not self.start_size or epoch >= growing:
            return full
        return min(full, max(4, 4 * round((self.start_size + (full - self.start_size) * epoch / growing) / 4)))


TRAIN_PRESETS: dict[str, TrainConfig] = {
    "cifar10": TrainConfig(start_size=20),
    "cifar100": TrainConfig(start_size=20),
    "digits": TrainConfig(
        epochs=40, batch_size=64, lr=0.1, weight_decay=5e-4, crop_padding=1, flip=False, bf16=False, channels_last=False),
}
"""By data set."""


def train_preset(dataset: str, **settings) -> TrainConfig:
    """The data set's settings, or the defaults where it has none, with others where given."""
    return TRAIN_PRESETS.get(dataset, TrainConfig()).replace(**settings)


def train_teacher(
        model: nn.Module,
        data: ImageSet,
        preprocessing: Preprocessing,
        config: TrainConfig,
        *,
        run_dir: str | Path | None = None,
        resume: bool = False,
        evaluate: Callable[[nn.Module], float] | None = None,
        on_step: Callable[[int, int], object] | None = None,
        on_epoch: Callable[[dict], object] | None = None) -> list[dict]:
    """Train a float network in place, on its device; the last epoch is what counts.

    Args:
        model: takes normalized images ``[B, C, S, S]`` of any S (for ``start_size``), gives logits.
        run_dir: folder for ``config.toml``, ``run.json``, ``metrics.csv`` and ``checkpoint.pt`` (every epoch).
        resume: go on from the checkpoint in run_dir; on the CPU, bit-identical to a run that was never interrupted.
        evaluate: called on the network after the last epoch; its number is the metric ``accuracy``. It decides nothing.
        on_step: called with the steps done and the images of the step. on_epoch: called with each epoch's metrics.

    Returns:
        The metrics, one dict per epoch.

    Raises:
        ValueError: before training, for fewer images than a batch, or images of another size or number of channels.
        FloatingPointError: if training diverged. FileExistsError, OSError: see
            :class:`~granq_plugin.zero_shot.run_directory.RunDirectory`.
    """
    preprocessing(data.images[:1])  # complains before training
    if config.compile == "cudagraphs":
        check_device(next(model.parameters()).device, "network")
    if len(data) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size} exceeds the {len(data)} training images of {data.source!r}")
    if run_dir is None:
        return _train(model, data, preprocessing, config, None, evaluate, on_step, on_epoch)
    with RunDirectory(run_dir, config, dict(network=model), resume) as directory:
        return _train(model, data, preprocessing, config, directory, evaluate, on_step, on_epoch)


def _train(model, data, preprocessing, config, directory, evaluate, on_step, on_epoch) -> list[dict]:
    device = next(model.parameters()).device
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, config)
    rng = torch.Generator().manual_seed(config.seed)
    first, metrics, full = 0, [], preprocessing.image_size
    with directory.checkpoint() if directory else nullcontext() as state:
        if state is not None:
            model.load_state_dict(state["model"])
            load_optimizer(optimizer, state["optimizer"])
            rng.set_state(state["rng"])
            first, metrics = state["epoch"], state["metrics"]
            if first not in range(config.epochs + 1) or len(metrics) != first:
                raise ValueError(f"it is of epoch {first!r} of {config.epochs} and has metrics of {len(metrics)}")
    images, labels = data.images.to(device), data.labels.to(device)  # a GPU would wait for every batch
    steps, params, recorded = len(data) // config.batch_size, list(model.parameters()), {}

    def learn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Loss, number of hits and gradients."""
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)
        return loss.detach(), (logits.argmax(1) == y).sum(), torch.autograd.grad(loss, params)

    for epoch in range(first, config.epochs):
        model.train()
        start, size = time.perf_counter(), config.size_in(epoch, full)
        loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        order = torch.randperm(len(data), generator=rng)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * config.lr_factor((epoch * steps + step) / (config.epochs * steps))
            chosen = order[step * config.batch_size:(step + 1) * config.batch_size].to(device, non_blocking=True)
            x, y = images[chosen], labels[chosen]
            x = preprocessing(random_crop_flip(x, config.crop_padding, config.flip, rng))
            if size != full:
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
            if config.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            if config.compile == "cudagraphs" and size not in recorded:
                recorded[size] = RecordedStep(learn)
            loss, hits, grads = recorded.get(size, learn)(x, y)
            update_parameters(optimizer, params, grads)
            loss_sum += loss
            correct += hits
            if on_step:
                on_step(epoch * steps + step + 1, len(y))
        row = dict(epoch=epoch + 1, image_size=size, lr=optimizer.param_groups[0]["lr"], loss=float(loss_sum) / steps,
                   train_accuracy=100 * float(correct) / (steps * config.batch_size),
                   images_per_second=steps * config.batch_size / (time.perf_counter() - start))
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"training diverged in epoch {epoch + 1}: loss is {row['loss']}; lower lr={config.lr:g}")
        model.eval()
        if evaluate and epoch + 1 == config.epochs:
            row["accuracy"] = evaluate(model)
        metrics.append(row)
        if directory:
            directory.save_metrics(metrics)
            directory.save_checkpoint(dict(
                epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict(), rng=rng.get_state(), metrics=metrics))
        if on_epoch:
            on_epoch(row)
    model.eval()
    return metrics


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    matrices, others = [], []
    for p in model.parameters():
        (matrices if p.dim() > 1 else others).append(p)
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
