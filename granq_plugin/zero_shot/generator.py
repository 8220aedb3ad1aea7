"""The generator of synthetic images: label and noise in, normalized images out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granq_plugin.zero_shot import parallel
from granq_plugin.zero_shot.statistics import batch_statistics

__all__ = ["Generator", "upsample_conv"]


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batch of all ranks (torch's SyncBatchNorm runs on GPUs alone)."""

    def forward(self, x: Tensor) -> Tensor:
        if parallel.world_size() == 1 or not self.training:
            return super().forward(x)
        mean, var = batch_statistics(x)
        with torch.no_grad():
            count = parallel.world_size() * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = (var + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shift = -mean * scale + (0 if self.bias is None else self.bias)
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)`` with 4 instead of 9 products per output pixel.

    Behind a nearest-neighbour upsampling the taps of a 3x3 kernel meet equal pixels: an output pixel sees 2x2 input pixels under
    sums of taps, which is what a transposed convolution of stride 2 with a 4x4 kernel computes. Equal up to rounding.

    Args:
        x: ``[B, I, H, W]``. weight: ``[O, I, 3, 3]``. bias: ``[O]`` or None.

    Returns:
        ``[B, O, 2H, 2W]``.
    """
    # x[i] reaches output 2i + t - 1 through the taps 2 - t (as pixel 2i of the upsampled) and 3 - t (as pixel 2i + 1)
    place = torch.arange(4, device=weight.device)[:, None] + torch.arange(3, device=weight.device)
    taps = ((place == 2) | (place == 3)).to(weight.dtype)  # [t, tap of 3]; computed, as a GPU would wait for a copy
    kernel = torch.einsum("tk,ul,oikl->iotu", taps, taps, weight)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        kernel = kernel.contiguous(memory_format=torch.channels_last)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


class UpsampleConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution; the parameters are the convolution's."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.weight, self.bias)


class Generator(nn.Module):
    """Conditional generator of the published recipe (method: GDFQ, AdaDFQ).

    Label embedding times noise -> linear to ``[128, S/4, S/4]`` -> two upsampling convolutions (128, 64 channels) -> 3x3
    convolution -> tanh -> BatchNorm without affine parameters, so that images have mean 0 and variance 1 per channel: the
    distribution of normalized inputs. Always in training mode: batch statistics belong to it.

    Args:
        image_size: S, height and width, divisible by 4. num_classes: labels are 0 to num_classes - 1.
        latent_dim: length of the noise vector. image_channels: channels of an image.
        channels_last: memory format of the convolutions and of the images.
    """

    def __init__(
            self, image_size: int, num_classes: int, latent_dim: int = 100, image_channels: int = 3,
            channels_last: bool = False) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size must be a positive multiple of 4, got {image_size}")
        self.latent_dim = latent_dim
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.start_size = image_size // 4
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self.linear = nn.Linear(latent_dim, 128 * self.start_size**2)
        self.bn0 = BatchNorm2d(128)
        self.conv1 = UpsampleConv2d(128, 128, 3)
        self.bn1 = BatchNorm2d(128, eps=0.8)
        self.conv2 = UpsampleConv2d(128, 64, 3)
        self.bn2 = BatchNorm2d(64, eps=0.8)
        self.conv3 = nn.Conv2d(64, image_channels, 3, padding=1)
        self.bn3 = BatchNorm2d(image_channels, affine=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Noise ``[B, latent_dim]`` and labels ``[B]`` -> images ``[B, image_channels, S, S]``."""
        x = self.linear(self.embedding(labels) * noise)
        x = x.view(len(x), 128, self.start_size, self.start_size).contiguous(memory_format=self.memory_format)
        x = self.bn0(x)
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Images ``[count, image_channels, S, S]`` of all classes in turn, the same ones for the same seed; on this rank alone."""
        noise = torch.randn(count, self.latent_dim, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(count) % self.embedding.num_embeddings
        like = self.linear.weight
        with parallel.alone():
            return self(noise.to(like), labels.to(like.device))
