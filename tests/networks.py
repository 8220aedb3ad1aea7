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


class Depthwise(nn.Module):
    """As MobileNetV2: expand, depthwise, project, with a residual addition."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0, self.relu0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6()
        self.expand, self.bn1, self.relu1 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()
        self.depthwise, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()
        self.project, self.bn3 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu0(self.bn0(self.stem(x)))
        y = self.relu2(self.bn2(self.depthwise(self.relu1(self.bn1(self.expand(x))))))
        return self.fc(self.flatten(self.pool(x + self.bn3(self.project(y)))))


class Concat(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1, self.conv2, self.relu2 = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU()
        self.conv3, self.relu3, self.pool = nn.Conv2d(6, 4, 1), nn.ReLU(), nn.MaxPool2d(2)
        self.flatten, self.fc = nn.Flatten(), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.cat([self.relu1(self.conv1(x)), self.relu2(self.conv2(x))], 1)
        return self.fc(self.flatten(self.pool(self.relu3(self.conv3(x)))))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


EXPORTED = {"sequential": sequential, "depthwise": Depthwise, "concat": Concat, "mlp": mlp}
