"""Independent numpy versions of the package's formulas, and inputs to compare them on (strategies, small nets).

Nothing here calls ``granq_plugin``. numpy arithmetic of one dtype rounds exactly as torch's on CPU does, so that
comparisons are exact. ``number / tensor`` is ``tensor.reciprocal() * number`` in torch, and is written so here.
"""

import brevitas.nn as qnn
import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

MIN_RANGE = 1e-8
BIT_WIDTHS = st.integers(1, 16)
SEEDS = st.integers(0, 2**32 - 1)


# --- formulas


def granq(x: np.ndarray, bit_width: int, channel_axis: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper's formula in the dtype of x (float32 or float64): ``(value, scale, zero_point)``."""
    f = x.dtype.type
    axes = tuple(d for d in range(x.ndim) if d not in _kept_axes(x.ndim, channel_axis))
    with np.errstate(all="ignore"):
        lo, hi = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
        s = f(1) / np.maximum(hi - lo, f(MIN_RANGE)) * f(2**bit_width - 1)
        z = np.rint(s * lo)
        q = np.rint(s * x - z)
        return (q + z) / s, f(1) / s, -z


def _kept_axes(ndim: int, channel_axis: int) -> tuple[int, ...]:
    if ndim == 1:
        return ()
    return (0, ) if ndim == 2 else (0, channel_axis % ndim)


def granq_tensor(x: torch.Tensor, bit_width: int, channel_axis: int = 1) -> torch.Tensor:
    """The value of :func:`granq` for a torch tensor; half precision in float32, rounded to its dtype, saturating."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    value = torch.from_numpy(granq(wide.numpy(), bit_width, channel_axis)[0])
    if x.dtype == value.dtype:
        return value
    limit = torch.finfo(x.dtype).max
    return value.clamp(-limit, limit).to(x.dtype)


def affine_params(
        lo: np.ndarray, hi: np.ndarray, bit_width: int, signed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a range that is stretched to contain 0."""
    f = lo.dtype.type
    lo, hi = np.minimum(lo, f(0)), np.maximum(hi, f(0))
    if signed:
        scale = np.maximum(np.maximum(-lo, hi), f(MIN_RANGE)) / f(2**(bit_width - 1) - 1)
        return scale, np.zeros_like(scale)
    scale = np.maximum(hi - lo, f(MIN_RANGE)) / f(2**bit_width - 1)
    return scale, np.rint(-lo / scale)


def integers(
        x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bit_width: int, signed: bool = False,
        narrow: bool = False) -> np.ndarray:
    """The integers of clamped affine quantization."""
    low = -2**(bit_width - 1) + narrow if signed else int(narrow)
    high = 2**(bit_width - 1) - 1 if signed else 2**bit_width - 1
    return np.clip(np.rint(x / scale + zero_point), low, high).astype(x.dtype)


def affine_quantize(x, lo, hi, bit_width: int, signed: bool = False, narrow: bool = False) -> np.ndarray:
    """Fake quantization of x with a known range (static activations, weights)."""
    scale, zero_point = affine_params(lo, hi, bit_width, signed)
    return (integers(x, scale, zero_point, bit_width, signed, narrow) - zero_point) * scale


def ranges(x: np.ndarray, kept_axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum over all axes but one."""
    axes = tuple(d for d in range(x.ndim) if d != kept_axis)
    return x.min(axes, keepdims=True), x.max(axes, keepdims=True)


def weight_quant(w: torch.Tensor, bit_width: int, output_axis: int = 0, symmetric: bool = False) -> torch.Tensor:
    """GranQWeightPerChannel, or its symmetric narrow version."""
    w = w.detach().numpy()
    return torch.from_numpy(affine_quantize(w, *ranges(w, output_axis), bit_width, symmetric, symmetric))


def assert_equal(actual, expected) -> None:
    """Exactly equal values, NaN equal to NaN, same shape and dtype."""
    actual, expected = (torch.as_tensor(t).detach() for t in (actual, expected))
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def every_launch(*launches):
    """Instead of granq_plugin.kernels.triton_launch.Fastest: all of its launches, one after the other, which must agree."""
    def launch(x, y, mask, *others) -> None:
        found = []
        for one in launches:
            for t in (y, *others[:2]):  # and scale, zero point
                t.fill_(float("nan"))
            one(x, y, mask, *others)
            found.append([t.clone() for t in (y, mask, *others[:2])])
        for again in found[1:]:
            for a, b in zip(found[0], again):
                assert_equal(a, b)
    return launch


# --- inputs


@st.composite
def values(draw, shape, channel_axis: int = 1, dtype=np.float32) -> np.ndarray:
    """An array of the drawn style: offsets and widths over many orders of magnitude, ties, ReLU-like, dead channels."""
    rng = np.random.default_rng(draw(SEEDS))
    ndim = len(shape)
    per_channel = [n if d in _kept_axes(ndim, channel_axis) else 1 for d, n in enumerate(shape)]
    style = draw(st.sampled_from(["normal", "wide", "offset", "ties", "relu", "negative", "subnormal"]))
    x = rng.standard_normal(shape)
    if style == "wide":
        x = x * 10.0**rng.uniform(-20, 20, per_channel)
    elif style == "offset":
        offset = rng.choice([-1, 1], per_channel) * 10.0**rng.uniform(-6, 6, per_channel)
        x = x * 10.0**rng.uniform(-6, 3, per_channel) + offset
    elif style == "ties":  # half-way between two levels wherever the range is a power of two less one
        x = rng.integers(-16, 16, shape) / 2
    elif style == "relu":
        x = np.maximum(x, 0)
    elif style == "negative":
        x = -np.abs(x) - 0.5
    elif style == "subnormal":
        x = x * np.finfo(dtype).smallest_normal
    dead = rng.random(per_channel) < draw(st.sampled_from([0.0, 0.3]))
    constants = rng.standard_normal(per_channel)
    return np.where(dead, constants, x).astype(dtype)


@st.composite
def activations(draw, dtype=np.float32) -> tuple[np.ndarray, int]:
    """``(x, channel_axis)``: x of 1 to 5 axes, any channel axis, also written from the end."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    ndim = len(shape)
    channel_axis = 1 if ndim == 1 else draw(st.integers(1, ndim - 1))
    x = draw(values(shape, channel_axis, dtype))
    return x, channel_axis - ndim if ndim > 1 and draw(st.booleans()) else channel_axis


def randomize_batch_norm(net: nn.Module) -> nn.Module:
    """Running statistics as a trained network has them, not 0 and 1."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return net


class QuantNet(nn.Module):
    """conv - bn - relu - conv - relu - pool - linear, quantized as the paper places its quantizers."""

    def __init__(self, act_quant, weight_quant, bit_width: int = 4, **act_options) -> None:
        super().__init__()
        weight = dict(weight_quant=weight_quant, weight_bit_width=bit_width)
        act = dict(act_quant=act_quant, bit_width=bit_width, **act_options)
        self.conv1 = qnn.QuantConv2d(3, 8, 3, padding=1, **weight)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = qnn.QuantReLU(**act)
        self.conv2 = qnn.QuantConv2d(8, 8, 3, **weight)
        self.relu2 = qnn.QuantReLU(**act)
        self.fc = qnn.QuantLinear(8, 5, bias=True, **weight)
        randomize_batch_norm(self)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class FloatResNet(nn.Module):
    """A float net with a residual addition and a pool, for Brevitas's graph mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)
        randomize_batch_norm(self)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(torch.add(self.bn2(self.conv2(x)), x))
        return self.fc(torch.flatten(self.pool(x), 1))
