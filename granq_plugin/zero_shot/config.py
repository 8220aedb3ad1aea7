"""Settings of zero-shot QAT, with the published ones as presets."""

import math
from dataclasses import dataclass

from granq_plugin.settings import Settings, setting

__all__ = ["PRESETS", "ZeroShotConfig", "preset"]


@dataclass(frozen=True)
class ZeroShotConfig(Settings):
    """Settings of :func:`granq_plugin.zero_shot.zero_shot_qat`. Defaults are the paper's for CIFAR (``method``: GranQ, AdaDFQ).

    Each field's meaning and bounds are in its metadata; ``granq qat --help-config`` prints them.

    Raises:
        TypeError, ValueError: at construction, naming the field, the value and what is allowed.

    Example:
        >>> config = preset("cifar10", epochs=20, seed=1)
        >>> config.batch_size, config.total_iterations
        (16, 4000)
    """

    num_classes: int = setting(10, "classes of the teacher", least=2, most=2**17)
    image_size: int = setting(32, "height and width of an input in pixels, a multiple of 4", least=8, most=2**12)
    image_channels: int = setting(3, "channels of an input", least=1, most=2**10)

    epochs: int = setting(200, "epochs, warm-up included; an epoch has no meaning but for the schedule and the log", least=1)
    iterations: int = setting(200, "iterations in an epoch", least=1)
    warmup_epochs: int = setting(4, "first epochs, in which only the generator learns", least=0)
    batch_size: int = setting(16, "images of an iteration, over all ranks and micro-batches", least=1, most=2**16)
    accumulation_steps: int = setting(
        1, "micro-batches of an iteration; batch statistics (generator, BatchNorm loss) are of the micro-batch", least=1)
    seed: int = setting(0, "of the generator's weights, the noise and the labels", least=0)

    student_optimizer: str = setting("sgd", "sgd: Nesterov, as published; adam: AdamW", choices=("sgd", "adam"))
    student_lr: float = setting(1e-4, "learning rate of the student", above=0)
    student_lr_warmup: int = setting(0, "the student's first iterations, over which its learning rate rises linearly", least=0)
    scale_lr_factor: float = setting(1.0, "learned scales of static activations learn at student_lr times this", above=0)
    scale_headroom: float = setting(
        1.0, "what learned scales are multiplied by at the end: natural images reach further than synthetic ones", above=0, most=10)
    momentum: float = setting(0.9, "of the student's SGD", least=0, most=0.999)
    weight_decay: float = setting(1e-4, "of the student", least=0)
    generator_lr: float = setting(1e-3, "learning rate of the generator (Adam)", above=0)
    betas: tuple[float, float] = setting((0.5, 0.999), "of the generator's Adam", least=0, most=0.9999)
    lr_schedule: str = setting("step", "step: times lr_decay at every milestone; cosine: to 0 at the end",
                                choices=("step", "cosine"))
    lr_milestones: tuple[int, ...] = setting((100, 200, 300), "epochs, of the step schedule", least=1)
    lr_decay: float = setting(0.1, "factor of the step schedule", above=0, most=1)

    temperature: float = setting(20.0, "T of the student's loss", above=0)
    lambda_lower: float = setting(0.1, "lower margin of the generator's loss", least=0, most=1)
    lambda_upper: float = setting(0.8, "upper margin of the generator's loss", least=0, most=1)
    alpha_disagreement: float = setting(0.2, "weight of CE(t - q, y) in beta's term (alpha_ds)", least=0)
    alpha_agreement: float = setting(0.1, "weight of CE(t + q, y) in beta's term (alpha_as)", least=0)
    beta: float = setting(1.0, "weight of the two cross-entropies in the generator's loss", least=0)
    gamma: float = setting(1.0, "weight of the BatchNorm statistics in the generator's loss", least=0)
    latent_dim: int = setting(100, "length of the generator's noise", least=1, most=2**14)

    range_epochs: int = setting(
        0, "epochs of training, after the warm-up, in which static ranges follow the student before they freeze; 0: half of them",
        least=0)
    memory_size: int = setting(0, "synthetic images that are kept with the teacher's logits, the latest ones; 0: none", least=0)
    replay_steps: int = setting(0, "additional student steps per iteration on images drawn from the memory", least=0)

    image_gain: float = setting(
        1.0, "images from the memory are multiplied by random factors from its inverse to it; 1: none (beyond the paper)", least=1,
        most=100)
    image_shift: int = setting(0, "images from the memory are moved by up to so many pixels, at random (beyond the paper)", least=0)
    image_flip: bool = setting(False, "every second image from the memory is mirrored, at random (beyond the paper)")

    feature_loss: str = setting(
        "off", "also distil the BatchNorm outputs: as they are, or their attention maps (beyond the paper)",
        choices=("off", "features", "attention"))
    feature_weight: float = setting(1.0, "of feature_loss, beside the student's loss", least=0)
    ema_decay: float = setting(0.0, "of a moving average of the student's weights, which is the result; 0: none (beyond the paper)",
                               least=0, most=0.99999)
    sam_rho: float = setting(0.0, "length of the step to the sharpest neighbour, where gradients are taken; 0: none; doubles the "
                             "student's work (beyond the paper: ZSAQ)", least=0)
    low_pass: float = setting(0.0, "cut-off of a Gaussian low-pass filter on synthetic images, in cycles per image; 0: none "
                              "(beyond the paper: SynQ)", least=0)

    bf16: bool = setting(False, "autocast the networks to bfloat16; quantizers, losses and statistics stay float32")
    channels_last: bool = setting(True, "run the convolutions in channels_last layout: a fifth faster on CPU")
    compile: str = setting(
        "off", "default: torch.compile of teacher, student and generator; cudagraphs: every step is recorded once and launched as "
        "one (one GPU)", choices=("off", "default", "cudagraphs"))
    checkpoint_every: int = setting(
        200, "iterations between checkpoints, in a run directory; there is one every minute, too", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {self.image_size}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(f"accumulation_steps must divide batch_size={self.batch_size}, got {self.accumulation_steps}")
        if self.lambda_lower > self.lambda_upper:
            raise ValueError(f"lambda_lower must not exceed lambda_upper={self.lambda_upper}, got {self.lambda_lower}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs={self.epochs}, got {self.warmup_epochs}")
        if self.image_shift >= self.image_size:
            raise ValueError(f"image_shift must be less than image_size={self.image_size}, got {self.image_shift}")
        if self.replay_steps and self.memory_size < self.batch_size:
            raise ValueError(f"replay_steps needs a memory_size of at least batch_size={self.batch_size}, got {self.memory_size}")

    @property
    def total_iterations(self) -> int:
        return self.epochs * self.iterations

    @property
    def augments(self) -> bool:
        """Whether images from the memory are changed, so that the teacher must see them again."""
        return self.image_gain > 1 or self.image_shift > 0 or self.image_flip

    def lr_factor(self, iteration: int) -> float:
        """What both learning rates are multiplied by in an iteration, counted from 0."""
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * iteration / self.total_iterations))
        return self.lr_decay**sum(iteration // self.iterations >= m for m in self.lr_milestones)


_IMAGENET = dict(num_classes=1000, image_size=224, batch_size=16, epochs=400, temperature=5.0, lr_milestones=(350, 400))

_FAST = dict(batch_size=32, epochs=24, iterations=50, warmup_epochs=2, student_lr=5e-4, lr_schedule="cosine", memory_size=20_000,
             replay_steps=2)

# learned static scales, from another run's images
_STATIC = dict(batch_size=32, iterations=50, warmup_epochs=0, range_epochs=4, student_lr=5e-4, scale_lr_factor=10.0,
               lr_schedule="cosine", image_flip=True)

PRESETS: dict[str, ZeroShotConfig] = {
    "cifar10": ZeroShotConfig(),
    "cifar100": ZeroShotConfig(num_classes=100, batch_size=200),
    "cifar10_fast": ZeroShotConfig(**_FAST),
    "cifar10_long": ZeroShotConfig(epochs=60, lr_schedule="cosine", feature_loss="features", feature_weight=10.0),
    "cifar10_static": ZeroShotConfig(
        **_STATIC, epochs=128, image_gain=2.0, image_shift=4, feature_loss="features", feature_weight=10.0),
    "cifar100_fast": ZeroShotConfig(**_FAST, num_classes=100),
    "cifar100_static": ZeroShotConfig(
        **_STATIC, epochs=100, image_gain=1.25, image_shift=2, scale_headroom=1.1, num_classes=100),
    "digits_fast": ZeroShotConfig(**_FAST | dict(image_size=8, image_channels=1, epochs=12, checkpoint_every=100)),
    "imagenet_resnet18": ZeroShotConfig(**_IMAGENET, student_lr=1e-5, warmup_epochs=50),
    "imagenet_mobilenet_v2": ZeroShotConfig(**_IMAGENET, student_lr=1e-5, warmup_epochs=4),
    "imagenet_resnet50": ZeroShotConfig(
        **_IMAGENET | dict(lr_milestones=(150, 300, 400)), student_lr=1e-4, warmup_epochs=50, lambda_lower=0.4),
}
"""The published settings at 3 bits, ``fast`` ones for CIFAR and digits, a ``long`` one that keeps its accuracy where the published
schedule loses it, and ``static`` ones for learned static scales, which need the images of another run; how those were chosen is
told in docs/results.md."""


def preset(name: str, **settings) -> ZeroShotConfig:
    """A named preset, with other settings where given.

    Raises:
        ValueError: for an unknown name or setting.

    Example:
        >>> preset("cifar10_fast", image_size=64, num_classes=20).total_iterations
        1200
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name].replace(**settings)
