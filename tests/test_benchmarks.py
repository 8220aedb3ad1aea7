"""The committed table is what the command writes, and the command quantizes what its labels say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from granq_plugin.core.proxy import GranQDynamicActProxy, GranQStaticActProxy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def accuracy():
    """benchmarks/ is not part of the wheel: load it from its file."""
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "benchmarks" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_s_table_is_the_committed_csv_s(accuracy, tmp_path):
    rows = accuracy.read_rows()
    assert len(rows) == sum(len(a) for _, a in accuracy.REGIMES.values()) * len(accuracy.BIT_WIDTHS)
    assert all(f"{100 * int(r['correct']) / int(r['images']):.2f}" == r["top1"] for r in rows)
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    accuracy.write_readme_table(rows, copy)
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_every_regime_builds_what_it_says(accuracy):
    batches = lambda: iter([torch.randn(4, 3, 6, 6)])  # noqa: E731
    for weights, (quantizer, all_activations) in accuracy.REGIMES.items():
        for activations in all_activations:
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
            network = accuracy.quantized_network(model, weights, activations, 4, batches)
            proxy = network[1].act_quant
            assert isinstance(proxy, GranQDynamicActProxy) == (activations == "dynamic")
            assert isinstance(proxy, GranQStaticActProxy) == (activations == "static")
            scale_shape = tuple(network[0].weight_quant.scale().shape)
            assert scale_shape == ((4, 3, 1, 1) if quantizer == "GranQWeightPerKernel" else (4, 1, 1, 1))
            assert torch.isfinite(network(next(batches()))).all()


def test_plot_is_drawn(accuracy, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (bench extra) is not installed")
    accuracy.plot(accuracy.read_rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
