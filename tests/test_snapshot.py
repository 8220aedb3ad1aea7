"""A module is put back as it was, and only where it changed."""

import pytest
import torch
from torch import nn

from granq_plugin.snapshot import Snapshot


def model():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.calls, net.name = [1], "a"
    net[1].running_var.fill_(float("nan"))
    return net


@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "name", "b"), lambda m: setattr(m, "new", 1), lambda m: m.calls.append(2), lambda m: delattr(m, "name"),
    lambda m: m[1].running_mean.add_(1), lambda m: m[1](torch.randn(4, 2)), lambda m: m.append(nn.ReLU()), lambda m: m.eval(),
    lambda m: setattr(m[1].running_mean, "data", torch.zeros(5)), lambda m: m[0].register_buffer("b", torch.ones(1)),
    lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 2)))])
def test_what_is_put_back(change):
    net = model()
    with torch.no_grad():
        kept = {k: v.clone() for k, v in net.state_dict().items()}
        snapshot = Snapshot(net)
        assert snapshot.holds()
        for _ in range(2):
            change(net)
            assert not snapshot.holds()
            snapshot.restore()
            assert snapshot.holds()
    assert net.calls == [1] and net.name == "a" and not hasattr(net, "new") and len(net) == 2 and net[1].training
    for (k, v), (name, value) in zip(kept.items(), net.state_dict().items(), strict=True):
        assert k == name
        torch.testing.assert_close(v, value, rtol=0, atol=0, equal_nan=True)


def test_hooks_can_still_be_removed():
    """Their handles refer to the dictionaries of the module."""
    net = model()
    snapshot = Snapshot(net)
    handle = net.register_forward_hook(lambda *a: None)
    snapshot.restore()
    assert not net._forward_hooks
    handle.remove()
    kept = net.register_forward_hook(lambda *a: None)
    snapshot = Snapshot(net)
    net.name = "c"
    snapshot.restore()
    kept.remove()
    assert not net._forward_hooks
