"""The committed tables are what the commands write, and the commands measure what their labels say."""

import csv

import pytest
import torch
from torch import nn

from benchmarks import accuracy, export, quantizer, readme, recipe, zero_shot
from granq_plugin.core.proxy import GranQDynamicActProxy, GranQStaticActProxy


def test_the_accuracy_table_is_the_committed_csv_s():
    rows = accuracy.read_rows()
    assert len(rows) == sum(len(a) for _, a in accuracy.REGIMES.values()) * len(accuracy.BIT_WIDTHS)
    assert all(f"{100 * int(r['correct']) / int(r['images']):.2f}" == r["top1"] for r in rows)
    assert readme.current_table(accuracy.MARKER) == accuracy.table(rows)


def test_the_recipe_table_is_the_committed_csv_s():
    rows = recipe.read_rows()
    assert all(float(r["ratio"]) == pytest.approx(float(r["published_ms"]) / float(r["ours_ms"]), rel=0.01) for r in rows)
    assert readme.current_table(recipe.MARKER) == recipe.table(rows)


def test_replacing_a_table_leaves_the_rest(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- x: by y -->\nold\n<!-- /x -->\nb\n")
    readme.replace_table("x: by y", "| new |", path)
    assert path.read_text() == "a\n<!-- x: by y -->\n| new |\n<!-- /x -->\nb\n"
    assert readme.current_table("x: by y", path) == "| new |"


def test_recipe_times_both_loops():
    for part, functions in recipe.parts(2, "cpu").items():
        times = recipe.measure(functions, 1, "cpu")
        assert part in ("student", "iteration") and all(t[0] > 0 for t in times)


def test_every_regime_builds_what_it_says():
    batches = lambda: iter([torch.randn(4, 3, 6, 6)])  # noqa: E731
    for weights, (weight_quantizer, all_activations) in accuracy.REGIMES.items():
        for activations in all_activations:
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
            network = accuracy.quantized_network(model, weights, activations, 4, batches)
            proxy = network[1].act_quant
            assert isinstance(proxy, GranQDynamicActProxy) == (activations == "dynamic")
            assert isinstance(proxy, GranQStaticActProxy) == (activations == "static")
            scale_shape = tuple(network[0].weight_quant.scale().shape)
            assert scale_shape == ((4, 3, 1, 1) if weight_quantizer == "GranQWeightPerKernel" else (4, 1, 1, 1))
            assert torch.isfinite(network(next(batches()))).all()


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (bench extra) is not installed")
    accuracy.plot(accuracy.read_rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_zero_shot_table_is_the_committed_csv_s():
    rows = zero_shot.read_rows()
    assert readme.current_table(zero_shot.MARKER) == zero_shot.table(rows)
    for row in rows:
        assert f"{float(row['top1']) / float(row['float_top1']):.3f}" == f"{float(row['retention']):.3f}"
        with open(zero_shot.LOGS / row["log"], newline="") as f:
            last = list(csv.DictReader(f))[-1]
        assert int(last["iterations"]) == int(row["iterations"]) and f"{float(last['accuracy']):.2f}" == row["top1"]


def test_the_export_table_is_the_committed_csv_s():
    rows, ladder = (export.read_rows(export.RESULTS / name) for name in ("export.csv", "export_ladder.csv"))
    assert readme.current_table(export.MARKER) == export.table(rows, ladder)
    for row in rows:
        if row["kind"] == "folded":
            assert int(row["unequal_integers"]) == 0 and row["close"] == row["images"] and row["correct"] == row["torch_correct"]


def test_the_quantizer_table_is_the_committed_csv_s():
    rows, scaling, memory = (quantizer.read_rows(f"quantizer{name}.csv") for name in ("", "_scaling", "_memory"))
    assert readme.current_table(quantizer.MARKER) == quantizer.table(rows, scaling, memory)
    floors = {(r["shape"], r["mode"]): float(r["median_ms"]) for r in rows if r["method"] == "clone"}
    assert len(floors) == len(quantizer.SHAPES) * len(quantizer.MODES)
    for r in rows:
        ratio = float(r["median_ms"]) / floors[r["shape"], r["mode"]]
        assert float(r["ratio_to_clone"]) == pytest.approx(ratio, rel=0.01, abs=0.002)


def test_the_quantizers_that_are_timed_do_what_their_labels_say():
    """One scale per sample and channel gives at most 16 values each; one per tensor, 16 in all."""
    x = torch.randn(2, 8, 6, 6)
    for name, method in quantizer.methods(8).items():
        y = method(x)
        assert y.shape == x.shape and name in quantizer.LABELS
        if name == "clone":
            continue
        levels, levels_of_channel = y.unique().numel(), max(y[b, c].unique().numel() for b in range(2) for c in range(8))
        assert levels_of_channel <= 16
        assert (levels <= 16) == (name == "brevitas_per_tensor"), (name, levels)
    times = quantizer.in_turns(quantizer.callers(dict(clone=torch.clone), (2, 3, 4, 4), "forward+backward"), 0.01)
    assert len(times["clone"]) >= 5


def test_the_quantizer_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (bench extra) is not installed")
    quantizer.plot_shapes(quantizer.read_rows("quantizer.csv"), tmp_path / "a.png")
    quantizer.plot_scaling(quantizer.read_rows("quantizer_scaling.csv"), tmp_path / "b.png")
    assert all((tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in "ab")
