"""Losses against numpy, and at their known values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from granq_plugin.zero_shot import losses


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def entropy(x):
    p = softmax(x)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(1)


def cross_entropy(x, y):
    return -np.log(softmax(x)[np.arange(len(y)), y]).mean()


def logits(seed, batch, classes):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 4, (batch, classes)), rng.normal(0, 4, (batch, classes)), rng.integers(0, classes, batch)


CASES = given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(2, 12))


@CASES
def test_losses_are_their_equations(seed, batch, classes):
    t, q, y = logits(seed, batch, classes)
    T, Q, Y = torch.tensor(t), torch.tensor(q), torch.tensor(y)
    close = dict(rtol=1e-10, abs=1e-12)
    assert losses.student_loss(T, Q, 7.0).item() == pytest.approx(-49 * entropy((t - q) / 7).mean(), rel=1e-10)
    h = entropy(t - q)
    h = (h - h.min()) / (math.log(classes) - h.min())
    expected = np.maximum(0.3 - h, 0).mean() + np.maximum(h - 0.6, 0).mean()
    assert losses.margin_loss(T, Q, 0.3, 0.6).item() == pytest.approx(expected, rel=close["rtol"], abs=close["abs"])
    assert losses.disagreement_loss(T, Q, Y).item() == pytest.approx(cross_entropy(t - q, y), rel=1e-9, abs=1e-12)
    assert losses.agreement_loss(T, Q, Y).item() == pytest.approx(cross_entropy(t + q, y), rel=1e-9, abs=1e-12)
    assert losses.teacher_agreement(T, Q).item() == pytest.approx((t.argmax(1) == q.argmax(1)).mean())


@CASES
def test_student_loss_is_least_where_only_a_constant_differs(seed, batch, classes):
    t, q, _ = logits(seed, batch, classes)
    shift = np.random.default_rng(seed).normal(size=(batch, 1))
    least = losses.student_loss(torch.tensor(t), torch.tensor(t + shift), 20.0).item()
    assert least == pytest.approx(-400 * math.log(classes), rel=1e-12)
    assert losses.student_loss(torch.tensor(t), torch.tensor(q), 20.0).item() >= least - 1e-9


def test_student_loss_gives_the_teacher_no_gradient():
    t, q = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    losses.student_loss(t, q, 2.0).backward()
    assert t.grad is None and q.grad.abs().max() > 0


def test_margins_keep_what_lies_between_them():
    t = torch.zeros(3, 4, dtype=torch.float64)
    t[1, 0], t[2, 0] = 2.0, 50.0  # h: 1, between, 0
    h = losses.entropy(t)[1].item() / math.log(4)
    inside = losses.margin_loss(t, torch.zeros_like(t), 0.0, 1.0)
    outside = losses.margin_loss(t, torch.zeros_like(t), h + 0.1, h + 0.2)
    assert inside.item() == 0
    assert outside.item() == pytest.approx((h + 0.1 + 0.1) / 3 + (1 - h - 0.2) / 3, abs=1e-6)


def test_equal_entropies_do_not_divide_by_zero():
    t = torch.zeros(2, 3, requires_grad=True)
    loss = losses.margin_loss(t, torch.zeros(2, 3), 0.1, 0.8)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(t.grad).all()


def test_bn_statistics_loss_is_the_mean_over_layers():
    def layer(*values):
        return tuple(torch.tensor(v, dtype=torch.float64) for v in values)
    loss = losses.bn_statistics_loss([
        layer([1.0, 2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 3.0]), layer([0.0], [5.0], [0.0], [5.0])])
    assert loss.item() == ((1 + 4) / 2 + 4 / 2) / 2
