"""clear_ties(): no integer sum of a folded network lies on a rounding tie, and hardly anything else changes."""

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracles
from granq_plugin import to_static
from granq_plugin.deploy import check_finn, clear_ties, fold, prepare
from granq_plugin.deploy.ties import _shift
from granq_plugin.export import export_qcdq, verify
from granq_plugin.export.integers import record_quantizers
from networks import images32, quantized_as

NETWORKS = ("residual", "mobile", "without_norm", "mlp")


def distance_from_ties(model, x):
    """The smallest distance of any value in front of a quantizer of scale 1 from a tie, in steps."""
    with torch.no_grad(), record_quantizers(model) as recorder:
        model(x)
    smallest = 0.5
    for r in recorder.records[1:]:  # the image's has another scale
        inside = (r.exact > r.integers.min() - 0.6) & (r.exact < r.integers.max() + 0.6)
        smallest = min(smallest, np.abs(np.abs(r.exact - np.round(r.exact)) - 0.5)[inside].min(initial=0.5))
    return smallest


@pytest.mark.parametrize("name", NETWORKS)
def test_every_program_rounds_alike(tmp_path, name):
    folded, x = quantized_as("folded", name), images32(3, 64)
    cleared, layers = clear_ties(folded, x[:1])
    assert layers and all(r.largest_shift <= 0.01 and r.margin >= r.margin_before for r in layers)
    assert check_finn(cleared).passed
    margin = min(r.margin for r in layers)
    assert margin > 2e-5
    path = export_qcdq(cleared, x[:1], tmp_path / "m.onnx")
    agreement, = verify(path, cleared, x, executors=("onnxruntime", ), batch_size=64).agreements
    assert agreement.integers.unequal == 0 and agreement.close == agreement.images


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_are_as_far_from_ties_as_reported(name):
    """Only for the first layer are all sums seen; of the others none that is seen may be nearer than reported."""
    model, layers = clear_ties(quantized_as("folded", name), images32(0, 1))
    claimed = min(r.margin for r in layers)
    assert distance_from_ties(model, images32(4, 200)) >= min(claimed, 1e-3) - 1e-5 * 2


def planted(beta, out=4):
    """A folded network in which the sum 0, the commonest, lies a millionth of a step from a tie."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, out, 3, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.Flatten(), nn.Linear(out * 36, 3))
    model = fold(to_static(prepare(net.eval(), images32(0, 1)), [images32(1)]), images32(0, 1))
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        norm.bias.fill_(beta)
        norm.running_mean.zero_()
    return model, norm


def test_a_planted_tie_is_cleared():
    model, norm = planted(1.5 + 1e-6)
    x = torch.zeros(1, 3, 8, 8)
    assert distance_from_ties(model, x) < 1e-5
    cleared, layers = clear_ties(model, x)
    assert norm.bias.tolist() == [pytest.approx(1.5 + 1e-6)] * 4  # a copy was changed
    assert layers[0].margin_before < 1e-5 and layers[0].margin > 1e-4 and 0 < layers[0].largest_shift <= 0.01
    assert distance_from_ties(cleared, x) > 1e-4
    clear_ties(model, x, inplace=True)
    assert distance_from_ties(model, x) > 1e-4


@given(oracles.SEEDS, st.integers(1, 300), st.sampled_from([0.003, 0.01, 0.2]))
@settings(max_examples=60)
def test_shift_against_brute_force(seed, bound, max_shift):
    rng = np.random.default_rng(seed)
    alpha, beta = float(rng.normal() * 10.0**rng.uniform(-3, 1)), float(rng.normal() * 5)
    limits = (0, 15)
    shift, before, after = _shift(alpha, beta, bound, limits, max_shift, 0.5)
    sums = alpha * np.arange(-bound, bound + 1) + beta

    def margin(t):
        u = sums + t
        u = u[(sums > limits[0] - 1) & (sums < limits[1] + 1)]
        return np.abs(np.abs(u - np.round(u)) - 0.5).min(initial=0.5)

    assert abs(shift) <= max_shift
    assert before == pytest.approx(margin(0), abs=1e-9)
    assert margin(shift) >= after - 1e-9
    assert margin(shift) >= max(margin(t) for t in np.linspace(-max_shift, max_shift, 101)) - max_shift / 50


def test_bad_input():
    model, x = quantized_as("folded", "mlp"), images32(0, 1)
    for max_shift in (0, 0.5, -1.0):
        with pytest.raises(ValueError, match="max_shift must be in"):
            clear_ties(model, x, max_shift=max_shift)
    with pytest.raises(TypeError, match="got str"):
        clear_ties("model", x)
    for other in (quantized_as("dynamic", "mlp"), quantized_as("static", "mlp"), nn.Sequential(qnn.QuantReLU())):
        with pytest.raises(ValueError, match="fold"):
            clear_ties(other, x)
