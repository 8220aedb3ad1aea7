"""Batch statistics at BatchNorm layers, from the forward that is run anyway."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from granq_plugin.zero_shot.statistics import BatchNormStatistics, batch_norm_layers, batch_statistics, observed_batch_norm
from networks import teacher_network


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.floats(-100, 100), st.booleans())
def test_mean_and_variance_with_their_gradients(shape, shift, channels_last):
    x = (torch.randn(shape, dtype=torch.float64) + shift)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    axes = [d for d in range(x.dim()) if d != 1]
    upstream = torch.randn(2, shape[1], dtype=torch.float64)
    mean, var = batch_statistics(x)
    torch.testing.assert_close(mean, x.mean(axes), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, x.var(axes, correction=0), rtol=1e-10, atol=1e-10)
    ours, = torch.autograd.grad([mean, var], x, list(upstream))
    theirs, = torch.autograd.grad([x.mean(axes), x.var(axes, correction=0)], x, list(upstream))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.booleans(), st.booleans())
def test_batch_norm_and_its_statistics_in_one(shape, affine, channels_last):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = kind(shape[1], eps=0.3, affine=affine).double().eval().requires_grad_(False)
    for v in (layer.running_mean, layer.running_var, *layer.parameters()):
        v.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    axes = [d for d in range(x.dim()) if d != 1]
    ours = observed_batch_norm(x, layer)
    theirs = layer(x), x.mean(axes), x.var(axes, correction=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = [torch.randn_like(v) for v in theirs]
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, upstream), torch.autograd.grad(theirs, x, upstream), rtol=1e-10, atol=1e-10)
    # each of the two alone
    torch.testing.assert_close(
        torch.autograd.grad(observed_batch_norm(x, layer)[0], x, upstream[0]),
        torch.autograd.grad(layer(x), x, upstream[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_of_half_precision_is_rounded_once(dtype):
    layer = nn.BatchNorm2d(3).eval().requires_grad_(False)
    x = (torch.randn(4, 3, 5, 5) * 3 + 1).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, mean, _ = observed_batch_norm(x, layer)
    assert y.dtype == dtype and mean.dtype == torch.float32
    torch.testing.assert_close(y, layer(x.float()).to(dtype), rtol=2**-7, atol=0)
    assert torch.autograd.grad(y.sum() + mean.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_float32(dtype):
    x = (torch.randn(64, 2, 16, 16) * 100 + 300).to(dtype)
    mean, var = batch_statistics(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(var, x.double().var([0, 2, 3], correction=0).float(), rtol=1e-4, atol=0)


def test_hooks_record_every_layer_once_and_go():
    teacher = teacher_network()
    inputs = []
    for m in batch_norm_layers(teacher):
        m.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    observed = BatchNormStatistics(teacher)
    teacher(torch.randn(4, 3, 8, 8))
    seen = observed.take()
    assert len(seen) == len(inputs) == 3 and observed.take() == []
    for (mean, var, running_mean, running_var), x, layer in zip(seen, inputs, batch_norm_layers(teacher)):
        torch.testing.assert_close(mean, x.mean([0, 2, 3]))
        torch.testing.assert_close(var, x.var([0, 2, 3], correction=0), rtol=1e-4, atol=1e-6)
        assert running_mean is layer.running_mean and running_var is layer.running_var
    observed.remove()
    teacher(torch.randn(4, 3, 8, 8))
    assert observed.take() == [] and all("forward" not in vars(m) for m in teacher.modules())


def test_observing_changes_no_output():
    teacher, x = teacher_network().requires_grad_(False), torch.randn(4, 3, 8, 8)
    before = teacher(x)
    observed = BatchNormStatistics(teacher)
    torch.testing.assert_close(teacher(x), before)
    observed.remove()
    torch.testing.assert_close(teacher(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("teacher", [
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))])
def test_a_teacher_without_statistics_is_refused(teacher):
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"):
        batch_norm_layers(teacher)
