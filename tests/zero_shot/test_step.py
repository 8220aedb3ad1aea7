"""One iteration: its gradients are the published loop's, and it leaves out only what is wasted."""

import copy

import pytest
import torch
from torch import nn

import granq_plugin as gq
from benchmarks import published_loop
from granq_plugin.functional import granq
from granq_plugin.zero_shot import Generator, preset
from granq_plugin.zero_shot.step import ObservedTeacher, generator_step, student_step
from networks import teacher_network

CONFIG = preset("cifar10", image_size=8, batch_size=6)


def networks(weight_quant, act_quant=gq.GranQActPerChannel):
    teacher = teacher_network().double()
    student = gq.quantize(teacher, 3, 3, weight_quant=weight_quant, act_quant=act_quant).eval()
    generator = Generator(8, 10).double()
    return teacher, student, generator


def inputs(batch=6):
    return torch.randn(batch, 100, dtype=torch.float64), torch.randint(10, (batch, ))


@pytest.mark.parametrize("weight_quant", [gq.GranQWeightPerKernel, gq.GranQWeightPerChannel, gq.GranQWeightPerChannelSymmetric])
@pytest.mark.parametrize("overrides", [
    {}, dict(temperature=5.0, lambda_lower=0.4, lambda_upper=0.5, alpha_disagreement=0.7, beta=2.0, gamma=0.3)])
def test_gradients_are_those_of_the_published_loop(weight_quant, overrides):
    """float64; biases before a BatchNorm have gradient 0 in exact arithmetic, hence the absolute tolerance."""
    config = preset("cifar10", image_size=8, **overrides)
    teacher, student, generator = networks(weight_quant)
    reference = published_loop.Generator(8, 10).double()
    reference.load_state_dict(generator.state_dict())
    loop = published_loop.PublishedLoop(copy.deepcopy(teacher), copy.deepcopy(student), reference, config)
    noise, labels = inputs()
    loop.step(noise, labels)
    ours = generator_step(ObservedTeacher(teacher.requires_grad_(False)), student, generator, noise, labels,
                          list(generator.parameters()), list(student.parameters()), config)
    for ours_, theirs in ((ours.generator_grads, loop.generator_grads), (ours.student_grads, loop.student_grads)):
        largest = max(float(g.abs().max()) for g in theirs)
        assert largest > 1e-4
        torch.testing.assert_close(list(ours_), list(theirs), rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 5), (3, 7)])
def test_printed_formula_is_the_quantizer(shape):
    x = torch.randn(shape, requires_grad=True)
    y = published_loop.printed_formula(x, 3)
    torch.testing.assert_close(y, granq(x, 3).value, rtol=0, atol=1e-6)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_published_generator_is_the_generator():
    ours, theirs = Generator(12, 5).double(), published_loop.Generator(12, 5).double()
    theirs.load_state_dict(ours.state_dict())
    noise, labels = torch.randn(4, 100, dtype=torch.float64), torch.randint(5, (4, ))
    torch.testing.assert_close(ours(noise, labels), theirs(noise, labels), rtol=1e-10, atol=1e-12)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b, msg=name)


def test_each_network_runs_forward_once():
    teacher, student, generator = networks(gq.GranQWeightPerChannel)
    calls = []
    for name, network in (("teacher", teacher), ("student", student), ("generator", generator)):
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    conv = next(m for m in student.modules() if isinstance(m, nn.Conv2d))
    conv.weight_quant.register_forward_hook(lambda *_: calls.append("weight"))
    generator_step(ObservedTeacher(teacher), student, generator, *inputs(), list(generator.parameters()),
                   list(student.parameters()), CONFIG)
    assert sorted(calls) == ["generator", "student", "teacher", "weight"]


def test_warm_up_takes_no_student_gradients():
    teacher, student, generator = networks(gq.GranQWeightPerChannel)
    result = generator_step(ObservedTeacher(teacher), student, generator, *inputs(), list(generator.parameters()), [], CONFIG)
    assert result.student_grads == () and len(result.generator_grads) == len(list(generator.parameters()))


def test_student_step_on_known_images_is_the_second_half_of_a_step():
    teacher, student, generator = networks(gq.GranQWeightPerChannel)
    params = list(student.parameters())
    whole = generator_step(
        ObservedTeacher(teacher), student, generator, *inputs(), list(generator.parameters()), params, CONFIG)
    half = student_step(student, whole.images, whole.teacher_logits, params, CONFIG)
    torch.testing.assert_close(half.student_grads, whole.student_grads, rtol=0, atol=0)
    asked = student_step(student, whole.images, None, params, CONFIG, teacher=teacher)
    torch.testing.assert_close(asked.student_grads, half.student_grads, rtol=0, atol=0)
    assert torch.equal(asked.teacher_logits, whole.teacher_logits)
    assert half.log["loss_student"] == whole.log["loss_student"] >= 0
    assert half.log["agreement"] == whole.log["agreement"]


def test_nothing_but_gradients_comes_out():
    """Parameters, BatchNorm statistics of teacher and student, and the teacher's gradients stay as they were."""
    teacher, student, generator = networks(gq.GranQWeightPerChannel)
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in (("t", teacher), ("s", student))}
    generator_step(ObservedTeacher(teacher), student, generator, *inputs(), list(generator.parameters()),
                   list(student.parameters()), CONFIG)
    for n, m in (("t", teacher), ("s", student)):
        for k, v in m.state_dict().items():
            torch.testing.assert_close(v, before[n][k], rtol=0, atol=0)
    assert all(p.grad is None for m in (teacher, student, generator) for p in m.parameters())
