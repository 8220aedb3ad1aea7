"""The results table and its pictures, and that the committed ones are current."""

import dataclasses
from pathlib import Path

import pytest

import zoo
from granq_plugin.cli import run as granq
from zoo.card import Costs, Results, Training
from zoo.plots import plot
from zoo.quantization import Quantization
from zoo.readme import current_table
from zoo.tables import MARKER, REGIMES, regime_of, table

RESULTS_PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def entry(correct, images=10_000, float_top1=None, trained=True, **quantization):
    base = zoo.get_card("resnet20_cifar10")
    q = Quantization(**quantization) if quantization else None
    results = Results("x", images, correct, images, round(100 * correct / images, 2), 100.0, float_top1)
    return dataclasses.replace(
        base, name=base.name if q is None else f"{base.name}.{q.suffix}", quantization=q, results=results, weights=None,
        costs=Costs(1, 10, 10 * 16, 1), training=Training(1, "0", "logs/x.csv") if trained and q else None)


CARDS = [
    entry(9173), entry(8839, weight_bit_width=3, act_bit_width=3, float_top1=91.73),
    entry(9000, weight_bit_width=4, act_bit_width=4, trained=False),
    entry(9140, weight_bit_width=4, act_bit_width=4, weight_regime="per-kernel"),
    entry(8900, weight_bit_width=4, act_bit_width=4, weight_regime="per-output-channel-symmetric", activations="folded"),
    entry(400, 500, weight_bit_width=4, act_bit_width=4)]


def test_regimes_never_share_a_column():
    regimes = [Quantization(4, 4, w, a) for w in ("per-output-channel", "per-output-channel-symmetric", "per-kernel")
               for a in ("dynamic", "static")] + [Quantization(4, 4, "per-output-channel-symmetric", "folded")]
    regimes += [Quantization(4, 4, w, "static", learned_scale=True)
                for w in ("per-output-channel", "per-output-channel-symmetric")]
    assert sorted(map(regime_of, regimes)) == sorted(REGIMES)


def test_a_row_per_network_images_and_bits():
    lines = table(CARDS).split("\n\n")[0].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["network", "test images", "full precision", "bits", "dynamic", "folded (FINN)",
                        "per-kernel, dynamic (paper comparison only)"]
    assert cells[2:] == [
        ["resnet20_cifar10", "500", "-", "W4A4", "80.00", "", ""],
        ["resnet20_cifar10", "10000", "91.73", "W4A4", "90.00 (0.981) †", "89.00 (0.970)", "91.40 (0.996)"],
        ["resnet20_cifar10", "10000", "91.73", "W3A3", "88.39 (0.964)", "", ""]]
    assert "| SynQ | 92.76 / 88.11 |" in table(CARDS)


def test_the_committed_table_is_current():
    assert current_table(MARKER, RESULTS_PAGE) == table(zoo.get_card(n) for n in zoo.list_models())


@pytest.mark.parametrize("against", ["bits", "bit_operations"])
def test_pictures_are_drawn(tmp_path, against):
    pytest.importorskip("matplotlib", reason="matplotlib (zoo extra) is not installed")
    plot(CARDS, tmp_path / "p.png", against)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no quantized zoo entry has results"):
        plot(CARDS[:1], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_command_replaces_the_table_between_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n<!-- {MARKER} -->\nold\n<!-- /zoo -->\nb\n")
    assert granq(["zoo", "table", "--readme", str(readme), "--plots", str(tmp_path)]) == 0
    assert current_table(MARKER, readme) in capsys.readouterr().out and readme.read_text().startswith("a\n")
    assert {"zoo_accuracy.png", "zoo_bit_operations.png"} <= {f.name for f in tmp_path.iterdir()}
    readme.write_text("no markers")
    assert granq(["zoo", "table", "--readme", str(readme)]) == 2
    assert "needs one pair of markers" in capsys.readouterr().err
