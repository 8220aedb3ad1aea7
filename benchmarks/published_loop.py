"""The zero-shot QAT iteration as it is published, kept as the reference for results and for speed.

Written from the equations (arXiv 2503.18339, 2303.06869), not from anybody's code, in the order of the published loop: the
generator's step with a forward of its own through teacher and student, whose weight gradients are computed and dropped; then a
second forward of teacher and student on the same images for the student's step. Batch statistics come from forward hooks, as a
mean and a variance; activations go through the formula as it is printed.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Generator", "PublishedLoop", "printed_formula", "printed_student"]


class Generator(nn.Module):
    """The published generator, layer by layer; its state dict fits :class:`granq_plugin.zero_shot.Generator`."""

    def __init__(self, image_size: int, num_classes: int, latent_dim: int = 100, image_channels: int = 3) -> None:
        super().__init__()
        self.size = image_size // 4
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self.linear = nn.Linear(latent_dim, 128 * self.size**2)
        self.bn0 = nn.BatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(128, 0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64, 0.8)
        self.conv3 = nn.Conv2d(64, image_channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(image_channels, affine=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(self.embedding(labels) * noise).view(len(noise), 128, self.size, self.size)
        x = F.interpolate(self.bn0(x), scale_factor=2)
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(F.interpolate(x, scale_factor=2))), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


class PublishedLoop:
    """One iteration after another; ``step`` leaves the gradients of both networks in ``generator_grads`` and ``student_grads``.

    Args:
        teacher, student, generator: networks; teacher and student in evaluation mode.
        config: a ``granq_plugin.zero_shot.ZeroShotConfig``; its optional features are not used.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, generator: nn.Module, config) -> None:
        self.teacher, self.student, self.generator, self.config = teacher, student, generator, config
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), config.generator_lr, config.betas)
        self.student_optimizer = torch.optim.SGD(
            student.parameters(), config.student_lr, config.momentum, weight_decay=config.weight_decay, nesterov=True)
        self.layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.means, self.variances = [], []
        for layer in self.layers:
            layer.register_forward_hook(lambda *args: self.record(*args))

    def record(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0]
        self.means.append(x.mean([0, 2, 3]))
        self.variances.append(x.var([0, 2, 3], correction=0))

    def generator_loss(self, t: Tensor, q: Tensor, labels: Tensor, means: list[Tensor], variances: list[Tensor]) -> Tensor:
        config = self.config
        d = F.softmax(t - q, 1)
        h = -(d * F.log_softmax(t - q, 1)).sum(1)
        least = h.min().detach()
        h = (h - least) / (math.log(t.shape[1]) - least)
        margins = F.relu(config.lambda_lower - h).mean() + F.relu(h - config.lambda_upper).mean()
        classes = config.alpha_disagreement * F.cross_entropy(t - q, labels) + config.alpha_agreement * F.cross_entropy(
            t + q, labels)
        statistics = sum(
            F.mse_loss(mean, layer.running_mean) + F.mse_loss(var, layer.running_var)
            for mean, var, layer in zip(means, variances, self.layers)) / len(self.layers)
        return margins + config.beta * classes + config.gamma * statistics

    def student_loss(self, t: Tensor, q: Tensor) -> Tensor:
        d = (t - q) / self.config.temperature
        return self.config.temperature**2 * (F.softmax(d, 1) * F.log_softmax(d, 1)).sum(1).mean()

    def step(self, noise: Tensor, labels: Tensor, trains_student: bool = True) -> None:
        images = self.generator(noise, labels)
        self.means.clear()
        self.variances.clear()
        t = self.teacher(images)
        q = self.student(images)
        self.generator_optimizer.zero_grad()
        self.generator_loss(t, q, labels, self.means, self.variances).backward()
        self.generator_grads = [p.grad.clone() for p in self.generator.parameters()]
        self.generator_optimizer.step()
        if not trains_student:
            return
        images = images.detach()
        t = self.teacher(images).detach()
        self.student_optimizer.zero_grad()
        self.student_loss(t, self.student(images)).backward()
        self.student_grads = [p.grad.clone() for p in self.student.parameters()]
        self.student_optimizer.step()


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def printed_formula(x: Tensor, bit_width: int) -> Tensor:
    """The activation quantizer of the paper as it is printed, operation by operation, on ``[B, C, *spatial]`` or ``[B, F]``."""
    channels = x.shape[:1] if x.dim() == 2 else x.shape[:2]
    rows = x.detach().reshape(*channels, -1)
    shape = channels + (1, ) * (x.dim() - len(channels))
    lo, hi = rows.min(-1).values.view(shape), rows.max(-1).values.view(shape)
    s = (2**bit_width - 1) / torch.clamp(hi - lo, min=1e-8)
    z = (s * lo).round()
    return (_RoundThrough.apply(s * x - z) + z) / s


class _PrintedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return printed_formula(F.relu(x), self.bit_width)


class _PrintedReLU6(nn.ReLU6):
    def forward(self, x: Tensor) -> Tensor:
        return printed_formula(F.relu6(x), self.bit_width)


class _PrintedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, printed_formula(self.weight, self.bit_width), self.bias)


class _PrintedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, printed_formula(self.weight, self.bit_width), self.bias)


def printed_student(teacher: nn.Module, bit_width: int) -> nn.Module:
    """A copy of ``teacher`` with printed formulas on weights (per kernel, as published) and after every ReLU and ReLU6 module."""
    student = copy.deepcopy(teacher)
    kinds = ((nn.ReLU, _PrintedReLU), (nn.ReLU6, _PrintedReLU6), (nn.Conv2d, _PrintedConv2d), (nn.Linear, _PrintedLinear))
    for module in student.modules():
        for plain, printed in kinds:
            if type(module) is plain:
                module.__class__, module.bit_width = printed, bit_width
    return student
