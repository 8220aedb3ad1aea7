"""ResNets for 32x32 images (He et al. 2015, section 4.2), with the parameter names of akamaster/pytorch_resnet_cifar10."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarResNet", "convolution_shortcuts", "resnet20", "resnet56", "resnet8"]


class PaddingShortcut(nn.Module):
    """Option A: every second pixel, zero-padded to the new number of channels; no parameters."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.padding = in_channels, (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; one ReLU module per place, so that each can have its own quantizer."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PaddingShortcut(in_channels, out_channels)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, global average pooling, one linear layer.

    Args:
        depth: 6n + 2 (8, 20, 32, 44, 56, 110).
        num_classes: outputs.
        shortcut: "A" (padding, no parameters) or "B" (1x1 convolution, which FPGA tools need) where the shape changes.
        in_channels: of the images.

    Raises:
        ValueError: for another depth or shortcut.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, shortcut: str = "B", in_channels: int = 3) -> None:
        super().__init__()
        if not 8 <= depth <= 2000 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 20, 32, 44, 56, 110; up to 2000), got {depth}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1, shortcut)
        self.layer2 = self._stage(16, 32, blocks, 2, shortcut)
        self.layer3 = self._stage(32, 64, blocks, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` -> logits ``[B, num_classes]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.avgpool(x)))


def resnet8(num_classes: int = 10, shortcut: str = "B", in_channels: int = 3) -> CifarResNet:
    """ResNet-8: 78 thousand parameters; 0.8 M multiply-adds at 8x8."""
    return CifarResNet(8, num_classes, shortcut, in_channels)


def resnet20(num_classes: int = 10, shortcut: str = "B") -> CifarResNet:
    """ResNet-20: 0.27 M parameters, 41 M multiply-adds at 32x32."""
    return CifarResNet(20, num_classes, shortcut)


def resnet56(num_classes: int = 10, shortcut: str = "B") -> CifarResNet:
    """ResNet-56: 0.85 M parameters, 126 M multiply-adds at 32x32."""
    return CifarResNet(56, num_classes, shortcut)


def convolution_shortcuts(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace padding shortcuts (option A), which FPGA tools have no operator for, by equal 1x1 convolutions.

    The weights are 0 and 1, and the batch normalization behind them is the identity: float outputs stay exactly equal. The result
    has the structure of ``shortcut="B"`` and may be trained further. Any model with shortcuts of this file's is taken.

    Raises:
        ValueError: if the model has no padding shortcut.
    """
    model = model if inplace else copy.deepcopy(model)
    places = [name for name, m in model.named_modules() if isinstance(m, PaddingShortcut)]
    if not places:
        raise ValueError("model has no padding shortcut (option A) to replace")
    like = next(model.parameters())
    for name in places:
        old = model.get_submodule(name)
        channels = old.in_channels + 2 * old.padding
        convolution = nn.Conv2d(old.in_channels, channels, 1, 2, bias=False)
        # variance + eps is exactly 1 in float32 and float64; with eps 0, training would divide the constant 0 of the padding by 0
        norm = nn.BatchNorm2d(channels, eps=2.0**-17)
        norm.running_var.fill_(1 - 2.0**-17)
        with torch.no_grad():
            convolution.weight.zero_()
            convolution.weight[old.padding:channels - old.padding, :, 0, 0] = torch.eye(old.in_channels)
        model.set_submodule(name, nn.Sequential(convolution, norm).to(like).train(old.training))
    return model
