"""Small float networks that tests of conversion share."""

import brevitas.nn as qnn
import torch
import torch.nn.functional as F
from torch import nn


class SharedReLU(nn.Module):
    """As torchvision's residual blocks: one ReLU module, called twice, on different numbers of channels."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        return self.fc(self.relu(self.conv2(x)).mean([2, 3]))


class FunctionalReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.conv(x)).amax([2, 3])
        x = torch.relu(self.fc1(x)).relu() + F.relu6(x.sum(1, keepdim=True))
        return self.fc2(x)


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 2))


def image(seed=0, batch=2):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def quant_relus(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, qnn.QuantReLU)}


def teacher_network(classes=10):
    """A small teacher with a residual block, whose BatchNorm statistics are not the initial ones; for images of 8x8 and more."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) + x)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Block(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
            m.momentum = 1.0
    with torch.no_grad():  # statistics of some images: smooth ones, unlike noise
        network.train()(2 * F.interpolate(torch.randn(256, 3, 4, 4), scale_factor=4, mode="bilinear"))
    return network.eval()
