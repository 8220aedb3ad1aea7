"""The committed tables are what the commands write, and the commands measure what their labels say."""

import csv
import re

import numpy as np
import pytest
import torch
from torch import nn

import oracles
import zoo
from benchmarks import (
    ablation,
    accuracy,
    agreement,
    evaluate,
    export,
    finn_plus,
    fusion,
    gpu_bytes,
    gpu_code,
    gpu_launches,
    headline,
    quantizer,
    quantizer_gpu,
    readme,
    recipe,
    recipe_profile,
    zero_shot,
)
from benchmarks.rows import read as rows_of_file
from granq_plugin.core.proxy import GranQDynamicActProxy, GranQStaticActProxy
from granq_plugin.zero_shot import preset
from granq_plugin.zero_shot.step import generator_step
from zoo.data import ImageSet
from zoo.qat import train_student
from zoo.quantization import Quantization


def test_the_accuracy_table_is_the_committed_csv_s():
    rows = accuracy.read_rows()
    assert len(rows) == sum(len(a) for _, a in accuracy.REGIMES.values()) * len(accuracy.BIT_WIDTHS)
    assert all(f"{100 * int(r['correct']) / int(r['images']):.2f}" == r["top1"] for r in rows)
    assert readme.current_table(accuracy.MARKER) == accuracy.table(rows)


def test_the_recipe_tables_are_the_committed_csv_s():
    rows, profile = recipe.read_rows(), recipe.read_rows(recipe.RESULTS / "recipe_profile.csv")
    assert all(float(r["ratio"]) == pytest.approx(float(r["published_ms"]) / float(r["ours_ms"]), rel=0.01) for r in rows)
    cut = {tuple(r[k] for k in recipe.KEYS) for r in rows if r["compile"] == "off"}  # a CUDA graph cannot be cut into phases
    assert cut == {tuple(r[k] for k in recipe.KEYS) for r in profile}
    assert readme.current_table(recipe.MARKER) == recipe.tables()


def test_replacing_a_table_leaves_the_rest(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- x: by y -->\nold\n<!-- /x -->\nb\n")
    readme.replace_table("x: by y", "| new |", path)
    assert path.read_text() == "a\n<!-- x: by y -->\n| new |\n<!-- /x -->\nb\n"
    assert readme.current_table("x: by y", path) == "| new |"


def test_phases_of_the_recipe_are_the_loops():
    """Cut into pieces, both loops have the gradients of their uncut steps, and every phase has taken time."""
    torch.set_default_dtype(torch.float64)
    try:
        pairs = [recipe.loops("resnet20", 2, "cpu") for _ in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    (published, training, noise, labels), (whole, *_) = pairs
    clocks = recipe_profile.Clock("cpu"), recipe_profile.Clock("cpu")
    recipe_profile.published_phases(published, noise, labels, clocks[0])
    whole.step(noise, labels)
    ours = generator_step(
        pairs[1][1].observed, pairs[1][1].student, pairs[1][1].generator, noise, labels,
        list(pairs[1][1].generator.parameters()), list(pairs[1][1].student.parameters()), training.config)
    generator_grads, student_grads = recipe_profile.our_phases(training, noise, labels, clocks[1])
    for cut, uncut in (
            (published.generator_grads, whole.generator_grads), (published.student_grads, whole.student_grads),
            (generator_grads, ours.generator_grads), (student_grads, ours.student_grads)):
        largest = max(float(g.abs().max()) for g in uncut)
        assert largest > 0
        torch.testing.assert_close(list(cut), list(uncut), rtol=1e-9, atol=1e-12 * largest)
    assert all(ms > 0 for clock in clocks for ms in clock.milliseconds.values())
    assert "forward" not in vars(published.layers[0])  # nothing is left behind


def test_rows_of_a_setting_replace_those_of_the_same(tmp_path):
    row = dict(zip(recipe.FIELDS, ("resnet20", "cpu", 2, 16, "off", 30.0, 10.0, 3.0, 1, 1, 5)))
    path = tmp_path / "recipe.csv"
    recipe.merge_rows(path, recipe.FIELDS, [row | dict(network="resnet18")])
    recipe.merge_rows(path, recipe.FIELDS, [row | dict(batch_size=200), row])
    recipe.merge_rows(path, recipe.FIELDS, [row | dict(ours_ms=15.0)])
    rows = recipe.read_rows(path)
    assert [(r["network"], r["batch_size"], r["ours_ms"]) for r in rows] == [
        ("resnet20", "16", "15.0"), ("resnet20", "200", "10.0"), ("resnet18", "16", "10.0")]
    assert recipe.table(rows).splitlines()[2] == "| resnet20 | cpu, 2 threads | 16 | 33.33 it/s | 66.67 it/s | 3.00x |"


def test_the_quantizer_table_of_the_gpu_is_the_committed_csv_s():
    assert readme.current_table(quantizer_gpu.MARKER) == quantizer_gpu.tables()


def test_the_quantizer_table_of_the_gpu_has_what_was_measured():
    rows = [dict(zip(quantizer_gpu.FIELDS, ("GPU", "64x64x32x32", "channels_last", mode, launch, method, us, us, us, ratio, 1, 5)))
            for mode in quantizer_gpu.MODES for launch in quantizer_gpu.LAUNCHES
            for method, us, ratio in (("clone", "10.0", "1.0"), ("granq", "12.5", "1.25"))]
    scaling = [dict(method=m, ns_per_value=v) for m in ("clone", "granq") for v in ("0.02", "0.03")]
    memory = [dict(mode="forward", method=m, peak_extra_tensors="1.001") for m in ("clone", "granq")]
    text = quantizer_gpu.table(rows, scaling, memory)
    assert "| GranQ, dynamic | 1.25 | 1.00 |" in text
    assert "| | forward, graph | forward, from Python | forward+backward, graph | forward+backward, from Python |" in text
    assert "0.0200 to 0.0300 ns (largest / smallest 1.50" in text


def test_the_table_of_bytes_is_the_committed_csv_s():
    assert readme.current_table(gpu_bytes.MARKER) == gpu_bytes.tables()
    rows = {(r["shape"], r["memory_format"], r["method"]): float(r["ratio_to_clone"]) for r in gpu_bytes.read(
        gpu_bytes.RESULTS / "gpu_bytes.csv")}
    assert len(rows) == len(gpu_bytes.SHAPES) * len(gpu_bytes.FORMATS) * len(gpu_bytes.NAMES)
    for (shape, memory_format, method), ratio in rows.items():
        if method == "published":
            assert ratio >= 3 * rows[shape, memory_format, "granq"]


def test_bytes_of_operations_are_counted(monkeypatch):
    """By hand: views and empty tensors move nothing, a tensor that is read twice by one operation is read once."""
    x = torch.randn(2, 3, 4, 4)
    for function, reads, writes in (
            (lambda x: x.view(6, 16).t().unsqueeze(0), 0, 0), (torch.clone, 1, 1), (lambda x: x * x, 1, 1), (lambda x: x + 1, 1, 1),
            (lambda x: torch.empty_like(x), 0, 0), (lambda x: x.clone().relu_(), 2, 2), (lambda x: x > 0, 1, 0.25),
            (lambda x: x[:1] + x[1:], 1, 0.5), (lambda x: x.relu() + x, 3, 2),
            (lambda x: x + x[:, :1, :1, :1].expand_as(x), 2, 1)):
        assert gpu_bytes.moved(function, x) == (reads, writes)
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("GRANQ_KERNEL", "eager")
    rows = {r["method"]: r for r in gpu_bytes.measure((64, 4, 8, 8), "channels_last")}
    assert (rows["granq"]["reads"], rows["sum_fused"]["reads"], rows["sum_separate"]["reads"]) == ("1.00", "2.00", "4.03")
    for size, found in ((96, ("1.00", "1.000")), (800, ("2.00", "1.500"))):  # parts of a row: 9, and too many to be kept
        rows = {r["method"]: r for r in gpu_bytes.measure((64, 4, size, size), "channels_last")}
        assert (rows["granq"]["reads"], rows["granq"]["ratio_to_clone"]) == found


def test_the_table_of_launches_is_the_committed_csv_s():
    rows = gpu_launches.read(gpu_launches.RESULTS / "gpu_launches.csv")
    assert readme.current_table(gpu_launches.MARKER) == gpu_launches.table(rows)
    us = {(r["call"], r["launch"]): float(r["median_us"]) for r in rows}
    assert us["torch.clone", "again"] < us["GranQ, dynamic", "again"] < us["GranQ, dynamic", "triton"]


def test_launches_are_timed_without_a_gpu(run_python):
    """In a process of its own, which takes its tensors for a GPU's."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = ("from benchmarks import gpu_launches as g; from granq_plugin.kernels.triton_launch import Launch; f = Launch.__call__;"
            "g.pretend(); rows = g.measure(3, 2); print(len(rows), len(g.calls()), Launch.__call__ is f, min(float(r['low_us']) "
            "for r in rows) > 0)")
    assert run_python(code).split() == ["10", "5", "True", "True"]


def test_the_table_of_gpu_code_is_the_committed_csv_s():
    rows = gpu_code.read(gpu_code.RESULTS / "gpu_code.csv")
    assert readme.current_table(gpu_code.MARKER) == gpu_code.table(rows)
    assert len(rows) == len(gpu_code.SHAPES) * len(gpu_code.FORMATS) + sum(r["kernel"] == "granq_kept" for r in rows)
    assert all(int(r["spilled_bytes"]) <= 16 * (r["kernel"] == "granq_kept") for r in rows)
    assert min(int(r["resident_threads"]) for r in rows) >= 256


def test_gpu_code_is_counted_without_a_gpu(run_python):
    """A block of 8 rows of 64 places on a warp: 16 values of a thread, each with more than the formula's ten instructions."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = ("from benchmarks import gpu_code as g; g.pretend(); r, = g.measure((2, 8, 8, 8), 'contiguous_format'); "
            "print(r['kernel'], r['values'], r['threads'], r['instructions'] > 160, r['spilled_bytes'], float(r['per_value']) == "
            "round(r['instructions'] / 16, 1))")
    assert run_python(code).split() == ["granq", "512", "32", "True", "0", "True"]


def test_the_fusion_table_is_the_committed_csv_s():
    rows = fusion.read_rows()
    assert readme.current_table(fusion.MARKER) == fusion.table(rows)
    assert len(rows) == 2 * len(fusion.FORMATS) * len(fusion.MODES) * len(fusion.LABELS)


@pytest.mark.parametrize("memory_format", fusion.FORMATS)
@pytest.mark.parametrize("mode", fusion.MODES)
def test_the_ways_that_are_compared_compute_the_same(memory_format, mode):
    results = {name: f() for name, f in fusion.functions((2, 5, 6, 7), memory_format, mode).items()}
    assert set(results) == set(fusion.LABELS)
    for kind in ("norm", "sum"):
        a, b = results[f"{kind}_separate"], results[f"{kind}_fused"]
        for p, q in zip(*((a, b) if mode != "forward" else ([a], [b]))):
            oracles.assert_equal(p, q)


def test_recipe_times_whole_iterations():
    published, training, noise, labels = recipe.loops("resnet20", 2, "cpu")
    times = recipe.measure((lambda: published.step(noise, labels), training.step), 1, "cpu")
    assert training.iteration == 2 and all(t[0] > 0 for t in times)


def test_the_evaluate_table_is_the_committed_csv_s():
    rows = evaluate.read_rows()
    assert readme.current_table(evaluate.MARKER) == evaluate.table(rows)
    for setting in {tuple(r[k] for k in evaluate.KEYS) for r in rows}:
        speeds = {r["network"]: r for r in rows if tuple(r[k] for k in evaluate.KEYS) == setting}
        assert set(speeds) == set(evaluate.KINDS)
        for r in speeds.values():
            share = float(r["images_per_second"]) / float(speeds["float"]["images_per_second"])
            assert float(r["ratio"]) == pytest.approx(share, rel=0.01, abs=1e-3)
        least = 10 if setting[0] == "cpu" else 5
        assert float(speeds["loading"]["ratio"]) > least, "loading takes a tenth of the time, or a fifth of a GPU's"


def test_evaluate_runs_every_network_on_every_image():
    card = zoo.get_card("resnet20_cifar10")
    data = ImageSet(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6), "memory")
    models = evaluate.networks(card.build(), card.example_input(), 4)
    kinds = {kind: {type(m).__name__ for m in model.modules()} for kind, model in models.items()}
    assert tuple(models) == evaluate.KINDS
    assert "GranQDynamicActProxy" in kinds["dynamic"] and "GranQStaticActProxy" in kinds["static"]
    assert "IntQuant" in kinds["folded"] and not {"GranQDynamicActProxy", "GranQStaticActProxy"} & kinds["folded"]  # scale 1
    assert not any("Proxy" in name for name in kinds["float"] | kinds["loading"])
    seen = {kind: [] for kind in models}
    for kind, model in models.items():
        model.register_forward_pre_hook(lambda _, inputs, kind=kind: seen[kind].append(inputs[0]))
    speeds = evaluate.measure(models, data, card.preprocessing, 4, "cpu", "channels_last", 2)
    for kind, inputs in seen.items():
        assert [len(x) for x in inputs] == [4, 4, 2, 4, 2]  # the warm-up, then all images twice
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
        assert len(speeds[kind]) == 2 and min(speeds[kind]) > 0


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
    for benchmark in (accuracy, evaluate):
        benchmark.plot(benchmark.read_rows(), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


def test_the_zero_shot_table_is_the_committed_csv_s():
    rows = zero_shot.read_rows()
    assert readme.current_table(zero_shot.MARKER) == zero_shot.table(rows)
    for row in rows:
        with open(zero_shot.LOGS / row["log"], newline="") as f:
            last = list(csv.DictReader(f))[-1]
        assert int(last["iterations"]) == int(row["iterations"]) and f"{float(last['accuracy']):.2f}" == row["top1"]


def test_a_run_without_test_images_is_evaluated_later(tmp_path):
    card, out = zoo.get_card("resnet20_cifar10"), tmp_path / "run"
    teacher, images = card.build().eval(), torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8).numpy()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    pixels = card.preprocessing(torch.from_numpy(images).permute(0, 3, 1, 2))
    np.savez(tmp_path / "test.npz", x=images, y=teacher(pixels).argmax(1).numpy())
    config = preset("cifar10_fast", epochs=2, iterations=1, warmup_epochs=1, batch_size=2, memory_size=0, replay_steps=0)
    train_student(card, Quantization(3, 3), teacher, config, out, teacher_sha256="0")
    with pytest.raises(ValueError, match="was not evaluated"):
        zero_shot.row_of(out)
    other = card.build().eval()
    other.bn1.running_mean += 1
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="had another teacher"):
        zero_shot.evaluate_run(out, tmp_path, tmp_path / "other.pt")
    zero_shot.evaluate_run(out, tmp_path, tmp_path / "teacher.pt")
    row, last = zero_shot.row_of(out), zero_shot.read(out / "metrics.csv")[-1]
    assert (row["test_images"], row["float_top1"]) == (8, "100.00") and float(row["top1"]) == float(last["accuracy"])


def test_the_export_table_is_the_committed_csv_s():
    rows, ladder, hls4ml = (export.read_rows(export.RESULTS / name) for name in ("export.csv", "export_ladder.csv", "hls4ml.csv"))
    assert readme.current_table(export.MARKER) == export.table(rows, ladder, hls4ml)
    for row in rows:
        assert float(row["bound_used"] or 0) <= 1
        if row["kind"] == "folded":
            assert int(row["unequal_integers"]) == 0 and row["close"] == row["images"] and row["correct"] == row["torch_correct"]
    for row in ladder:
        assert row["rung"] != "exported file" or row["same_top1_as_folded"] == row["images"]


def test_the_finn_table_is_the_committed_csv_s():
    rows = finn_plus.read_rows()
    assert readme.current_table(finn_plus.MARKER) == finn_plus.table(rows)
    assert all((r["passed"] == "True") != (r["control"] == "True") for r in rows)
    assert {r["control"] for r in rows} == {"True", "False"}


def test_the_quantizer_table_is_the_committed_csv_s():
    rows, scaling, memory, fresh = (quantizer.read_rows(f"quantizer{name}.csv") for name in ("", "_scaling", "_memory", "_fresh"))
    assert readme.current_table(quantizer.MARKER) == quantizer.table(rows, scaling, memory, fresh)
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


def test_rows_of_different_teachers_are_not_in_one_table():
    row = dict.fromkeys(zero_shot.FIELDS, "1") | dict(network="n", test_images="10", float_top1="50", log="a.csv")
    text = zero_shot.table([row | dict(teacher_weights_sha256="a" * 64), row | dict(teacher_weights_sha256="b" * 64)])
    assert text.count("Full precision") == 2 and text.count("a.csv") == 2


def test_the_ablation_table_is_the_committed_csv_s():
    with open(ablation.RESULTS / "ablation.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    caption, _ = readme.current_table(ablation.MARKER).split("\n\n")
    assert readme.current_table(ablation.MARKER) == ablation.table(rows, caption)
    assert {r["switch"] for r in rows} == set(ablation.SWITCHES)


def test_the_agreement_table_is_the_committed_csv_s():
    rows = rows_of_file(agreement.RESULTS / "agreement.csv")
    assert readme.current_table(agreement.MARKER) == agreement.table(rows)
    assert rows and all(set(r) == set(agreement.FIELDS) and 0 < float(r["agreement"]) <= 100 for r in rows)


def test_the_first_table_of_the_readme_is_that_of_the_results():
    assert readme.page_of(headline.MARKER).name == "README.md"
    assert readme.current_table(headline.MARKER) == headline.current()
    lines = headline.accuracies()
    assert set(lines["full precision"]) == {(n, b) for n in headline.NETWORKS.values() for b in headline.BITS}
    first = headline.NETWORKS["CIFAR-10"]
    names = {f"{first}.granq_w{b}a{b}{s}" for b in headline.BITS for s in headline.TRAINED.values()} & set(zoo.list_models())
    assert len(names) >= 4
    teachers = {zoo.get_card(name).teacher.sha256 for name in names}
    assert teachers == {r["weights_sha256"] for r in accuracy.read_rows()}  # a column has one full precision
    assert {r["float_top1"] for r in accuracy.read_rows()} == {f"{lines['full precision'][first, 4]:.2f}"}


def test_each_pair_of_markers_stands_in_one_page():
    pages = [p.read_text(encoding="utf-8") for p in readme.PAGES]
    markers = [m for text in pages for m in re.findall(r"<!-- (\w+): written by", text)]
    assert len(markers) == len(set(markers)) and len(markers) >= 10
    with pytest.raises(ValueError, match="results.md' needs one pair of markers"):
        readme.current_table("nowhere: written by nobody")


def test_the_ladder_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (bench extra) is not installed")
    headline.plot(headline.read(headline.RESULTS / "export_ladder.csv"), tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
