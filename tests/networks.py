"""Small float networks that tests of conversion share."""

import copy
import functools

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


# --- networks of every shape that folding must follow; 3 input channels, 8 x 8 pixels


class Block(nn.Module):
    """A residual block: identity shortcut, convolution where the shape changes, or none of ReLU behind (linear bottleneck)."""

    def __init__(self, c_in, c_out, stride=1, groups=1, bias=False, relu=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups, bias=bias), nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias), nn.BatchNorm2d(c_out)
        self.short = nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=bias), nn.BatchNorm2d(c_out))
        self.relu2 = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + self.short(x))


class Concat(nn.Module):
    """Squeeze and expand with a concatenation of quantized and of float branches, and a channel shuffle."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.relu0 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.left, self.bn, self.right = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(4, 2, 3, padding=1)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.grouped, self.fc = nn.Conv2d(12, 4, 3, groups=2), nn.Linear(4 * 3 * 3, 5)

    def forward(self, x):
        x = self.relu0(self.squeeze(x))
        x = torch.cat([self.relu1(self.bn(self.left(x))), x, self.right(x)], 1)
        b, c, h, w = x.shape
        x = self.relu2(x).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.fc(F.max_pool2d(self.relu3(self.grouped(x)), 2).flatten(1))


class Consumers(nn.Module):
    """One activation, read by a convolution, a depthwise one, a pool, and the output; a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), nn.ReLU6()
        self.dense, self.depthwise = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 12, 3, groups=6)
        self.up, self.fc1, self.relu2 = nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.Linear(6, 4), nn.ReLU()
        self.pooled_bn, self.fc2 = nn.BatchNorm1d(6), nn.Linear(4, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        outputs = self.dense(x), self.depthwise(x[:, :, ::2, ::2]), self.up(x), x
        return tuple(o.flatten(1) for o in outputs) + (self.fc2(self.relu2(self.fc1(self.pooled_bn(pooled)))), )


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def without_norm():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, groups=3, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def mobile():
    """As MobileNetV2: depthwise convolutions, linear bottlenecks, additions without a ReLU behind."""

    class Bottleneck(nn.Module):
        def __init__(self, c_in, c_out, stride):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(c_in, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
                nn.Conv2d(12, 12, 3, stride, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
                nn.Conv2d(12, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
            self.residual = (c_in, stride) == (c_out, 1)

        def forward(self, x):
            return x + self.body(x) if self.residual else self.body(x)

    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), Bottleneck(4, 6, 2), Bottleneck(6, 6, 1),
        Bottleneck(6, 6, 1), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3))


def residual():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Block(4, 4), Block(4, 8, 2), Block(8, 8, bias=True),
        Block(8, 8, relu=False), Block(8, 8, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def shortcuts():
    """The two kinds of residual block, for tests of files, whose time goes with the number of nodes."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Block(4, 4), Block(4, 6, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 3))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(),
                         nn.Linear(7, 3))


FOLDABLE = dict(
    chain=chain, without_norm=without_norm, mobile=mobile, residual=residual, concat=Concat, consumers=Consumers, mlp=mlp)


def randomized(model, seed):
    """``model`` in float64 and evaluation mode, every parameter and statistic drawn at full precision (negative gammas too)."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                drawn = drawn.abs() + 0.1
            elif tensor.dim() > 1:
                drawn = drawn / tensor[0].numel()**0.5
            tensor.copy_(drawn)
    return model


def images64(seed, batch=4):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images32(seed, batch=4):
    return images64(seed, batch).float()


def quantized_as(kind, name, bits=4, seed=0):
    """The FOLDABLE network ``name``, or ``shortcuts``, with random weights, in float32: "dynamic", "static" or "folded"."""
    return copy.deepcopy(_quantized_as(kind, name, bits, seed))


@functools.cache
def _quantized_as(kind, name, bits, seed):
    from granq_plugin import quantize, to_static
    from granq_plugin.deploy import fold, prepare
    model = randomized((shortcuts if name == "shortcuts" else FOLDABLE[name])(), seed).float()
    if kind == "dynamic":
        return quantize(model, bits, bits)
    if kind == "static":
        return to_static(quantize(model, bits, bits, input_bit_width=8), [images32(1, 8)])
    return fold(to_static(prepare(model, images32(0, 1), bits, bits), [images32(1, 8)]), images32(0, 1))
