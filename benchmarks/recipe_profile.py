"""Where the time of an iteration of zero-shot QAT goes: both loops, phase by phase.

The loops run as they are, but are cut at the networks' inputs and outputs, so that each piece can be timed; the gradients are those
of the uncut loops (tests).
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import published_loop
from granq_plugin.zero_shot import losses, statistics
from granq_plugin.zero_shot.step import generator_loss
from granq_plugin.zero_shot.training import Training, update_parameters

__all__ = ["PHASES", "Clock", "our_phases", "published_phases"]

PHASES = ("generator forward", "teacher forward", "student forward", "losses", "teacher backward", "student backward",
          "generator backward", "optimizers", "quantizers", "BatchNorm and statistics")
"""Disjoint, but for the last two: quantizers (of weights and activations, with the BatchNorm that they compute) are part of the
student forward, the teacher's BatchNorm layers with their batch statistics of the teacher forward."""


class Clock:
    """Milliseconds by phase; ``with clock(phase): ...`` adds to them."""

    def __init__(self, device: str) -> None:
        self.milliseconds = dict.fromkeys(PHASES, 0.0)
        self._synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.milliseconds[phase] += 1000 * (time.perf_counter() - start)

    def timed(self, phase: str, function: Callable) -> Callable:
        """``function``, timed."""
        def wrapper(*args, **kwargs):
            with self(phase):
                return function(*args, **kwargs)
        return wrapper


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def published_phases(loop: published_loop.PublishedLoop, noise: Tensor, labels: Tensor, clock: Clock) -> None:
    """One iteration of the published loop; its results stay where ``loop.step`` leaves them."""
    with _patched(published_loop, "printed_formula", clock.timed("quantizers", published_loop.printed_formula)), \
            _timed_batch_norms(loop, clock):
        loop.means.clear()
        loop.variances.clear()
        with clock("generator forward"):
            images = loop.generator(noise, labels)
        for_teacher, for_student = _leaf(images), _leaf(images)
        with clock("teacher forward"):
            t = loop.teacher(for_teacher)
        with clock("student forward"):
            q = loop.student(for_student)
        outputs = [t, q, *loop.means, *loop.variances]
        t, q, *moments = (_leaf(x) for x in outputs)
        with clock("losses"):
            loop.generator_optimizer.zero_grad()
            loop.generator_loss(t, q, labels, moments[:len(loop.means)], moments[len(loop.means):]).backward()
        with clock("teacher backward"):
            torch.autograd.backward([outputs[0], *outputs[2:]], [t.grad, *(m.grad for m in moments)])
        with clock("student backward"):
            outputs[1].backward(q.grad)
        with clock("generator backward"):
            images.backward(for_teacher.grad + for_student.grad)
        loop.generator_grads = [p.grad.clone() for p in loop.generator.parameters()]
        with clock("optimizers"):
            loop.generator_optimizer.step()
        images = images.detach()
        with clock("teacher forward"):
            t = loop.teacher(images).detach()
        with clock("student forward"):
            output = loop.student(images)
        q = _leaf(output)
        with clock("losses"):
            loop.student_optimizer.zero_grad()
            loop.student_loss(t, q).backward()
        with clock("student backward"):
            output.backward(q.grad)
        loop.student_grads = [p.grad.clone() for p in loop.student.parameters()]
        with clock("optimizers"):
            loop.student_optimizer.step()


def our_phases(training: Training, noise: Tensor, labels: Tensor, clock: Clock) -> tuple[list[Tensor], list[Tensor]]:
    """One iteration of ours; returns the gradients of generator and student."""
    config, (observed, student, generator) = training.config, training.networks
    params = list(training.student.parameters())
    with _timed_quantizers(training.student, clock):
        with clock("generator forward"):
            images = generator(noise, labels)
        for_teacher, for_student = _leaf(images), _leaf(images)
        with clock("teacher forward"), _patched(
                statistics, "observed_batch_norm", clock.timed("BatchNorm and statistics", statistics.observed_batch_norm)):
            outputs = observed(for_teacher)
        with clock("student forward"):
            output = student(for_student)
        t, bn_loss, q = (_leaf(x) for x in (*outputs, output))
        with clock("losses"):
            upstream = torch.autograd.grad(generator_loss(t, q, labels, bn_loss, config), (t, bn_loss, q))
        with clock("teacher backward"):
            from_teacher, = torch.autograd.grad(outputs, for_teacher, upstream[:2])
        with clock("student backward"):
            from_student, = torch.autograd.grad(output, for_student, upstream[2], retain_graph=True)
        with clock("generator backward"):
            generator_grads = torch.autograd.grad(images, list(generator.parameters()), from_teacher + from_student)
        with clock("losses"):
            upstream, = torch.autograd.grad(losses.student_loss(t, q, config.temperature), q)
        with clock("student backward"):
            student_grads = torch.autograd.grad(output, params, upstream)
        with clock("optimizers"):
            update_parameters(training.generator_optimizer, list(generator.parameters()), generator_grads)
            update_parameters(training.optimizer, params, student_grads)
    return list(generator_grads), list(student_grads)


@contextlib.contextmanager
def _patched(owner: object, name: str, value: object) -> Iterator[None]:
    """The attribute of this very object, which then is as it was (a method goes back to its class)."""
    before = vars(owner).get(name, _patched)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is _patched else setattr(owner, name, before)


@contextlib.contextmanager
def _timed_batch_norms(loop: published_loop.PublishedLoop, clock: Clock) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name in [(loop, "record"), *((layer, "forward") for layer in loop.layers)]:
            stack.enter_context(_patched(owner, name, clock.timed("BatchNorm and statistics", getattr(owner, name))))
        yield


@contextlib.contextmanager
def _timed_quantizers(student: nn.Module, clock: Clock) -> Iterator[None]:
    """Brevitas's proxies of weights and activations, which are not nested in one another."""
    from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
    from brevitas.proxy.runtime_quant import DynamicActQuantProxyFromInjector
    kinds = (ActQuantProxyFromInjector, DynamicActQuantProxyFromInjector, WeightQuantProxyFromInjector)
    with contextlib.ExitStack() as stack:
        for m in student.modules():
            if isinstance(m, kinds) and m.is_quant_enabled:
                stack.enter_context(_patched(m, "forward", clock.timed("quantizers", m.forward)))
        yield
