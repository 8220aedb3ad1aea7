"""Feature losses against numpy, and that they see every BatchNorm layer of both networks once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import granq_plugin as gq
from granq_plugin.deploy import fold, prepare
from granq_plugin.zero_shot import preset
from granq_plugin.zero_shot.features import FEATURE_LOSSES, FeaturePairs, attention_loss, feature_loss
from granq_plugin.zero_shot.statistics import batch_norm_layers
from granq_plugin.zero_shot.step import low_pass
from granq_plugin.zero_shot.training import Training
from networks import teacher_network


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_losses_are_numpys(batch, channels, height, width, seed):
    s, t = np.random.default_rng(seed).normal(size=(2, batch, channels, height, width))
    expected = ((s - t)**2).mean() / (t**2).mean()
    assert float(feature_loss(torch.tensor(s), torch.tensor(t))) == pytest.approx(expected)
    maps = [(x**2).mean(1).reshape(batch, -1) for x in (s, t)]
    maps = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps]
    expected = ((maps[0] - maps[1])**2).sum(1).mean()
    assert float(attention_loss(torch.tensor(s), torch.tensor(t))) == pytest.approx(expected)


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_pairs_are_the_layers_of_one_name(kind):
    teacher = teacher_network()
    student = gq.quantize(teacher, 3, 3).eval()
    seen = {"teacher": [], "student": []}
    for who, network in (("teacher", teacher), ("student", student)):
        for m in batch_norm_layers(network):
            m.register_forward_hook(lambda m, _, y, who=who: seen[who].append(y))
    pairs = FeaturePairs(teacher, student, kind)
    x = torch.randn(4, 3, 8, 8)
    teacher(x), student(x)
    loss = pairs.take()
    expected = [FEATURE_LOSSES[kind](s, t) for s, t in zip(seen["student"], seen["teacher"])]
    assert len(expected) == 3 and min(map(float, expected)) > 0
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.get_submodule("3.conv").weight.grad.abs().sum() > 0
    pairs.remove()
    teacher(x), student(x)
    with pytest.raises(StopIteration):
        pairs.take()


def test_features_of_a_folded_student_are_compared_in_real_values():
    teacher, images = teacher_network().eval(), torch.randn(64, 3, 8, 8)
    fine = dict(residual_bit_width=16, pool_bit_width=16, input_bit_width=16)
    static = gq.to_static(prepare(teacher, images[:1], 16, 16, **fine), [images])
    student = fold(static, images[:1], trainable=True)
    scaled = [m for m in batch_norm_layers(student) if hasattr(m, "output_scale")]
    assert scaled and max(float(m.output_scale.max() / m.output_scale.min()) for m in scaled) > 1.1
    assert not any("output_scale" in name for name in student.state_dict())
    pairs = FeaturePairs(teacher, student, "features")
    with torch.no_grad():
        teacher(images), student(images)
        assert float(pairs.take()) < 1e-4
        for m in scaled:
            del m.output_scale
        teacher(images), student(images)
        assert float(pairs.take()) > 1


def test_a_student_without_the_teachers_layers_is_refused():
    teacher = teacher_network()
    with pytest.raises(ValueError, match=r"feature_loss='features' compares BatchNorm layers by name, and the student has no '1'"):
        FeaturePairs(teacher, nn.Sequential(nn.Conv2d(3, 4, 1)), "features")


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.3, 20), st.integers(0, 99))
def test_low_pass_is_numpys_and_keeps_the_mean(height, width, cutoff, seed):
    x = np.random.default_rng(seed).normal(size=(2, 3, height, width))
    f = np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width
    expected = np.fft.ifft2(np.fft.fft2(x) * np.exp(-(f[0]**2 + f[1]**2) / (2 * cutoff**2))).real
    y = low_pass(torch.tensor(x), cutoff)
    np.testing.assert_allclose(y, expected, atol=1e-9)
    np.testing.assert_allclose(y.mean((2, 3)), x.mean((2, 3)), atol=1e-9)
    assert low_pass(torch.tensor(x).bfloat16(), cutoff).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, dict(sam_rho=0.1)])
def test_replayed_images_leave_no_statistics_for_the_generator(options):
    """Features need the teacher on replayed images; the generator's loss is of the generator's own images alone."""
    teacher = teacher_network()
    student = gq.quantize(teacher, 3, 3)
    config = preset("cifar10", image_size=8, batch_size=8, epochs=3, iterations=2, warmup_epochs=1, memory_size=20, replay_steps=2,
                    feature_loss="features", **options)
    training = Training(student, teacher.eval().requires_grad_(False), config, None)
    for _ in range(4):
        training.step()
        assert training.observed.statistics.take() == []
    training.close()
