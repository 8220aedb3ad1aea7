"""The generator, and its exact shortcut for upsampling before a convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from granq_plugin.zero_shot import Generator
from granq_plugin.zero_shot.generator import upsample_conv


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_upsample_conv_is_the_convolution_of_the_upsampled(batch, channels, out, height, width, has_bias):
    x = torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(out, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out, dtype=torch.float64, requires_grad=True) if has_bias else None
    ours = upsample_conv(x, weight, bias)
    theirs = F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    inputs = [v for v in (x, weight, bias) if v is not None]
    upstream = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [8, 12, 32, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_normalized(size, channels):
    generator = Generator(size, 7, latent_dim=5, image_channels=channels)
    images = generator(torch.randn(4, 5), torch.arange(4))
    assert images.shape == (4, channels, size, size)
    torch.testing.assert_close(images.mean([0, 2, 3]), torch.zeros(channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.var([0, 2, 3], correction=0), torch.ones(channels), rtol=0, atol=1e-2)


def test_labels_matter():
    generator = Generator(8, 3)
    noise = torch.randn(2, 100)
    a, b = (generator(noise, torch.tensor(y)) for y in ([0, 1], [0, 2]))
    assert (a[1] - b[1]).abs().max() > 0.01


@pytest.mark.parametrize("size", [0, 2, 30, -4])
def test_image_size_is_checked(size):
    with pytest.raises(ValueError, match=f"multiple of 4, got {size}"):
        Generator(size, 10)
