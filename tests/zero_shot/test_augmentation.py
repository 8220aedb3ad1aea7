"""Random changes of images, against loops; and that the teacher answers to what the student sees."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import granq_plugin as gq
from granq_plugin.zero_shot import preset, zero_shot_qat
from granq_plugin.zero_shot.augmentation import random_crop_flip, random_gain
from granq_plugin.zero_shot.training import Training
from networks import teacher_network

CONFIG = preset("cifar10", image_size=8, batch_size=8, epochs=2, iterations=2, warmup_epochs=1, image_gain=2.0, image_shift=2,
                image_flip=True)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_crops_and_mirrors_as_a_loop_does(count, height, width, padding, flip, seed):
    """Every image is one of its crops, mirrored or not, all channels alike; the decisions are those of the generator."""
    x = torch.arange(count * 2 * height * width).view(count, 2, height, width)
    y = random_crop_flip(x, padding, flip, torch.Generator().manual_seed(seed)).numpy()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    for image, whole in zip(y, padded):
        crops = [whole[:, r:r + height, c:c + width] for r in range(2 * padding + 1) for c in range(2 * padding + 1)]
        assert any(np.array_equal(image, crop) or (flip and np.array_equal(image, crop[:, :, ::-1])) for crop in crops)


def test_every_crop_and_both_orientations_come_up():
    x = torch.arange(2).expand(400, 1, 1, 2)
    seen = {tuple(row.flatten().tolist()) for row in random_crop_flip(x, 1, True, torch.Generator().manual_seed(0))}
    assert seen == {(0, 1), (1, 0), (0, 0)}  # (1, 0): mirrored, or moved left; (0, 0): moved up or down out of sight


@given(st.integers(1, 200), st.floats(1, 100), st.integers(0, 99))
def test_gains_are_one_factor_per_image_between_the_bounds(count, most, seed):
    x = torch.randn(count, 2, 3, 1)
    y = random_gain(x, most, torch.Generator().manual_seed(seed))
    factors = (y / x).double().flatten(1)
    assert y.dtype == x.dtype and torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-5)
    assert factors.max() <= most * (1 + 1e-5) and factors.min() >= (1 - 1e-5) / most


def test_gains_have_a_uniform_logarithm():
    factors = random_gain(torch.ones(20_000, 1), 4.0, torch.Generator().manual_seed(0)).flatten()
    shares = torch.histc(factors.log() / math.log(4), 10, -1, 1) / len(factors)
    assert (shares - 0.1).abs().max() < 0.01


def pair():
    torch.manual_seed(0)
    teacher = teacher_network()
    return gq.quantize(teacher, 3, 3), teacher


@pytest.mark.parametrize("feature_loss", ["off", "features"])
def test_the_teacher_answers_to_the_images_that_the_student_sees(feature_loss):
    """Every batch is new although the images are two, and both networks get the same one."""
    student, teacher = pair()
    seen = {"teacher": [], "student": []}
    training = Training(student, teacher.requires_grad_(False), CONFIG.replace(feature_loss=feature_loss), torch.randn(2, 3, 8, 8))
    for name, network in (("teacher", teacher), ("student", student)):
        network.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].clone()))
    logits = []
    handle = teacher.register_forward_hook(lambda _, x, y: logits.append(y))
    for _ in range(3):
        training.step()
    handle.remove()
    training.close()
    assert len(seen["teacher"]) == len(seen["student"]) == len(logits) == 3
    assert all(torch.equal(t, s) for t, s in zip(seen["teacher"], seen["student"]))
    assert len(torch.cat(seen["student"]).flatten(1).unique(dim=0)) == 3 * 8


def test_the_teacher_answers_to_no_image_before_it_is_changed():
    student, teacher = pair()
    teacher.register_forward_hook(lambda *_: pytest.fail("nobody reads this answer"))
    Training(student, teacher.requires_grad_(False), CONFIG, torch.randn(5, 3, 8, 8)).close()


def test_without_changes_the_teacher_need_not_see_the_images_again():
    student, teacher = pair()
    training = Training(
        student, teacher.requires_grad_(False), CONFIG.replace(image_gain=1.0, image_shift=0, image_flip=False),
        torch.randn(2, 3, 8, 8))
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    training.step()
    assert not calls


def test_the_loss_is_nothing_for_a_student_that_is_its_teacher():
    teacher = teacher_network().requires_grad_(False)
    student = nn.Sequential(teacher_network())
    student[0].load_state_dict(teacher.state_dict())
    training = Training(student, teacher, CONFIG.replace(channels_last=False), torch.randn(4, 3, 8, 8))
    log = training.step()
    assert float(log["agreement"]) == 1 and float(log["loss_student"]) == pytest.approx(0, abs=1e-3)


def test_changes_without_a_memory_are_refused():
    student, teacher = pair()
    with pytest.raises(ValueError, match="image_gain, image_shift and image_flip change images from the memory: give images, or"):
        zero_shot_qat(student, teacher, CONFIG)
    with pytest.raises(ValueError, match="image_shift must be less than image_size=8, got 8"):
        CONFIG.replace(image_shift=8)
