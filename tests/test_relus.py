"""Models whose ReLUs have to be found by tracing: the converted model is the same function, with a quantizer for every call."""

import warnings

import brevitas.nn as qnn
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from granq_plugin import quantize
from granq_plugin.relus import trace


class Net(nn.Module):
    """Two linear layers around ``middle(self, hidden)``."""

    def __init__(self, middle, **modules):
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(8, 8), nn.Linear(8, 4), middle
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.b(self.middle(self, self.a(x)))


def inplace_module(net, x):
    return net.relu(x) + x


def inplace_function(net, x):
    F.relu(x, inplace=True)
    return x


def inplace_method(net, x):
    y = x * 2
    y.relu_()
    return y + x


def own_and_shared(net, x):
    return net.relu(net.relu(x) - 0.5)


def name_collision(net, x):
    return net.relu(F.relu(x) - 0.3)


CASES = {
    "in-place module, input read again": (inplace_module, dict(relu=nn.ReLU(inplace=True)), 1),
    "in-place module, input not read again": (lambda net, x: net.relu(x), dict(relu=nn.ReLU(inplace=True)), 1),
    "in-place function": (inplace_function, {}, 1),
    "in-place method": (inplace_method, {}, 1),
    "shared": (own_and_shared, dict(relu=nn.ReLU()), 2),
    "shared and in place": (own_and_shared, dict(relu=nn.ReLU(inplace=True)), 2),
    "function before a module of its name": (name_collision, dict(relu=nn.ReLU()), 2),
    "keyword": (lambda net, x: F.relu(input=x), {}, 1),
    "relu6": (lambda net, x: F.relu6(x * 20), {}, 1),
    "positional inplace flag": (lambda net, x: F.relu(x, False) + x, {}, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_quantized_is_the_same_function_and_16_bits_come_near(case, training):
    middle, modules, count = CASES[case]
    model = Net(middle, **modules).train(training)
    x = torch.randn(5, 8)
    expected = model(x)
    assert torch.equal(quantize(model, None, None)(x), expected)
    quantized = quantize(model, 16, 16)
    assert sum(isinstance(m, qnn.QuantReLU) for m in quantized.modules()) == count
    assert all(m.training == training for m in quantized.modules() if not list(m.children()))
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=2e-3)


def test_functional_dropout_follows_the_mode():
    def middle(net, x):
        return F.dropout(F.relu(x), 0.5, net.training)

    x = torch.randn(64, 8)
    for start in (True, False):
        model = Net(middle).train(start)
        quantized = quantize(model, None, None)
        assert torch.equal(quantized.eval()(x), model.eval()(x))
        quantized.train()
        assert not torch.equal(quantized(x), quantized(x))


def test_a_forward_that_depends_on_the_mode_is_reported():
    def middle(net, x):
        return F.relu(x) + net.extra(x) if net.training else F.relu(x)

    model = Net(middle, extra=nn.Linear(8, 8)).eval()
    with pytest.warns(UserWarning, match="depends on its mode.*evaluation mode"):
        quantized = quantize(model, None, None)
    x = torch.randn(2, 8)
    assert torch.equal(quantized(x), model(x)) and not any(m.training for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantize(Net(own_and_shared, relu=nn.ReLU()))


def test_modes_of_single_modules_are_kept():
    model = Net(lambda net, x: F.relu(net.bn(x)), bn=nn.BatchNorm1d(8)).train()
    model.bn.eval()
    quantized = quantize(model)
    assert quantized.training and not quantized.bn.training and not model.bn.training


def test_optional_arguments_take_their_defaults():
    class Optional(Net):
        def forward(self, x, skip=None, double=False):
            x = F.relu(self.a(x))
            x = x if skip is None else x + skip
            return self.b(2 * x if double else x)

    model, x = Optional(None), torch.randn(2, 8)
    assert torch.equal(quantize(model, None, None)(x), model(x))


def test_hooks_are_kept_or_reported():
    calls = []
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[0].register_forward_hook(lambda m, i, o: o * 0)
    model[1].register_forward_pre_hook(lambda m, i: calls.append(m))
    assert quantize(model, 16, 16)(torch.randn(2, 8)).abs().max() == 0 and len(calls) == 1
    block = nn.Sequential(Net(own_and_shared, relu=nn.ReLU()))
    block[0].register_forward_hook(lambda m, i, o: o)
    with pytest.warns(UserWarning, match="hooks of modules that are traced through are not called any more: 0"):
        quantize(block)


class Caching(nn.Module):
    """Keeps something of its first input."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.mask = nn.Conv2d(3, 4, 3), nn.ReLU(), None

    def forward(self, x):
        y = self.relu(self.conv(x))
        if self.mask is None:
            self.mask = torch.ones_like(y[:1])
        return y * self.mask


def test_what_a_forward_keeps_is_no_proxy_of_its_trace():
    model = Caching().eval()
    trace(model)
    assert model.mask is None
    quantized = quantize(model, 4, 4)
    assert isinstance(quantized(torch.randn(2, 3, 5, 5)), torch.Tensor)
    with pytest.raises(RuntimeError, match="writes into the model"):
        trace(model, strict=True)
    assert model.mask is None


def second_view(self, h):
    one, other = h.view(-1, 2, 4), h.view(-1, 8)
    return F.relu_(one).flatten(1) + other


def view_of_a_view(self, h):
    one = h.view(-1, 2, 4)
    return F.relu_(one[:, :1]).flatten(1).repeat(1, 2) + one.flatten(1)


def made_before(self, h):
    other = h.view(-1, 2, 4)
    return F.relu_(h) + other.flatten(1)


@pytest.mark.parametrize("middle", [
    lambda self, h: F.relu_(h.view(-1, 2, 4)).flatten(1) + h, lambda self, h: self.relu(h.chunk(2, 1)[0]).repeat(1, 2) + h,
    second_view, view_of_a_view, made_before])
def test_relus_in_place_on_what_is_read_again_as_another_view_are_refused(middle):
    with pytest.raises(ValueError, match="in-place ReLU .* changes '.*', which shares its values and is read again"):
        quantize(Net(middle, relu=nn.ReLU(inplace=True)), 4, 4)


def test_relus_in_place_on_a_view_that_nobody_else_reads():
    for middle in (lambda self, h: F.relu_(h.view(-1, 2, 4)).flatten(1),
                   lambda self, h: F.relu_(h.view(-1, 2, 4)).view(h.shape),
                   lambda self, h: F.relu_(h.view(-1, 2, 4)).view(h.size(0), -1),
                   lambda self, h: F.relu_(self.pool(h.unsqueeze(1))[0]).squeeze(1).repeat(1, 2)):
        net = Net(middle, pool=nn.MaxPool1d(2, return_indices=True))
        assert torch.isfinite(quantize(net, 4, 4)(torch.randn(3, 8))).all()


def test_tracing_takes_no_parameters_apart():
    """Lazy ones have no values yet; others are not copied."""
    assert quantize(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)), 4, 4)[1].__class__ is qnn.QuantReLU
