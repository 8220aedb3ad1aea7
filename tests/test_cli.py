"""The granq command: results, and one line and exit code 2 for bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import zoo
from granq_plugin import cli
from granq_plugin.export.ranges_plot import activation_scales
from granq_plugin.zero_shot import ZeroShotConfig
from zoo.students import static_and_folded
from zoo.train import TrainConfig

NAME = "resnet20_cifar10"


@pytest.fixture
def folder(tmp_path):
    """A data folder with 40 images, and weights of the right architecture."""
    rng = np.random.default_rng(0)
    (tmp_path / "cifar10").mkdir()
    x, y = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 40)
    np.savez(tmp_path / "cifar10" / "test.npz", x=x, y=y)
    np.savez(tmp_path / "calibration.npz", x=x[:20], y=y[:20])
    torch.manual_seed(0)
    torch.save(zoo.get_card(NAME).build().state_dict(), tmp_path / "w.pt")
    return tmp_path


def arguments(folder, *more):
    return ["evaluate", NAME, "--data", str(folder), "--weights", str(folder / "w.pt"), *map(str, more)]


def run(args, capsys):
    code = cli.run([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("options, expected", [
    ([], dict(weight_bit_width=4, act_bit_width=4, weight_regime="per-output-channel", activations="dynamic")),
    (["--weight-bits", 3, "--act-bits", 5, "--weight-regime", "per-kernel"],
     dict(weight_bit_width=3, act_bit_width=5, weight_regime="per-kernel", activations="dynamic")),
    (["--static", "--calibration-images", 8, "--weight-regime", "per-output-channel-symmetric"],
     dict(activations="static", calibration_images=8)),
    (["--count", 12], dict(images=12)),
])
def test_evaluate_prints_and_writes_the_same_result(folder, capsys, monkeypatch, options, expected):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: not options)
    if "--static" in options:
        options = [*options, "--calibration-data", folder / "calibration.npz"]
    code, out, err = run(arguments(folder, *options, "--json", folder / "out.json"), capsys)
    assert code == 0, err
    report = json.loads((folder / "out.json").read_text())
    assert expected.items() <= report.items()
    assert report["images"] == expected.get("images", 40) and len(report["weights_sha256"]) == 64
    for label in ("float", "quantized"):
        assert f"{label:9} top-1 {report[f'{label}_top1']:6.2f} %" in out
    assert f"W{report['weight_bit_width']}A{report['act_bit_width']}" in out
    assert ("40/40" in err) == sys.stderr.isatty()  # the progress bar, which is for terminals
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.npz", "cifar10", "out.json", "w.pt"]  # no left-overs


@pytest.mark.parametrize("change, message", [
    (["--weight-bits", "0"], "whole number from 1 to 16, got 0"),
    (["--weight-bits", "-1"], "got -1"),
    (["--act-bits", "2.5"], "got 2.5"),
    (["--act-bits", "four"], "whole number from 1 to 16, got 'four'"),
    (["--act-bits", "nan"], "got nan"),
    (["--weight-regime", "per-tensor"], "'per-tensor' is not one of 'per-output-channel'"),
    (["--data", "/nonexistent/folder"], "there is no folder '/nonexistent/folder'"),
    (["--weights", "/nonexistent/w.pt"], "'/nonexistent/w.pt' does not exist"),
    (["--static"], "--static and --calibration-data FILE belong together"),
    (["--static", "--calibration-data", "/nonexistent.npz"], "'/nonexistent.npz' does not exist"),
    (["--calibration-images", "0"], "0 is not in the range"),
    (["--batch-size", "0"], "0 is not in the range"),
    (["--device", "abacus"], "device 'abacus' is not available here"),
    (["--json", "/nonexistent/out.json"], "its folder does not exist"),
    (["--json", "/"], "is a folder"),
    (["--compile", "cudagraphs", "--data", "/nonexistent/folder"], "needs a GPU; the network is on cpu"),
    (["--compile", "yes"], "'yes' is not one of 'off', 'cudagraphs'"),
    (["--device", "meta"], "device 'meta' is not available here"),
    (["--weight-bits", "1", "--weight-regime", "per-output-channel-symmetric"], "at least 2, got 1"),
    (["--colour"], "No such option"),
])
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, change, message):
    code, out, err = run(arguments(folder, *change), capsys)
    assert code == 2 and out == ""
    assert err.startswith("granq: error: ") and err.count("\n") == 1 and message in err


def test_unknown_network_other_weights_and_bad_images(folder, capsys):
    code, _, err = run(["evaluate", "resnet21_cifar10", "--data", folder, "--weights", folder / "w.pt"], capsys)
    assert code == 2 and "did you mean: resnet20_cifar10" in err
    torch.save({"fc.weight": torch.ones(2, 2)}, folder / "w.pt")
    code, _, err = run(arguments(folder), capsys)
    assert code == 2 and "weights of another architecture" in err and err.count("\n") == 1
    (folder / "cifar10" / "test.npz").write_bytes(b"PK garbage")
    code, _, err = run(arguments(folder), capsys)
    assert code == 2 and "not an .npz file" in err and err.count("\n") == 1


def test_incomplete_folder_and_empty_calibration_data(folder, capsys):
    np.savez(folder / "calibration.npz", x=np.zeros((0, 32, 32, 3), np.uint8), y=np.zeros(0, int))
    code, _, err = run(arguments(folder, "--static", "--calibration-data", folder / "calibration.npz"), capsys)
    assert code == 2 and "calibration_batches is empty" in err and err.count("\n") == 1
    (folder / "cifar10" / "test.npz").unlink()
    (folder / "cifar-10-batches-py").mkdir()
    code, _, err = run(arguments(folder), capsys)
    assert code == 2 and "is incomplete or damaged" in err and err.count("\n") == 1


def test_no_arguments_show_the_help(capsys):
    code, out, _ = run([], capsys)
    assert code == 0 and "evaluate" in out


def test_help_tells_every_verb_in_a_whole_sentence(capsys):
    for group, verbs in (([], cli.VERBS), (["zoo"], ("add", "card", "evaluate", "list", "table"))):
        _, out, _ = run([*group, "--help"], capsys)
        lines = [line for line in out.splitlines() if line.strip().split(" ")[0] in verbs and line.startswith("  ")]
        assert len(lines) >= len(verbs) and all(line.endswith(".") and not line.endswith("..") for line in lines[-len(verbs):])


@pytest.mark.parametrize("verb, some", [
    ("qat", "# digits_fast: image_size = 8, "), ("train-teacher", "# cifar10: start_size = 20\n")])
def test_help_config_prints_defaults_that_are_toml_and_what_presets_change(capsys, verb, some):
    code, out, _ = run([verb, "--help-config"], capsys)
    settings, presets = out.split("\n\n")
    config = (ZeroShotConfig if verb == "qat" else TrainConfig)
    assert code == 0 and config.from_toml(settings) == config() and some in presets


def test_no_data_folder(folder, capsys, monkeypatch):
    monkeypatch.delenv("GRANQ_DATA", raising=False)
    code, _, err = run(["evaluate", NAME, "--weights", folder / "w.pt"], capsys)
    assert code == 2 and "give --data DIR or set GRANQ_DATA" in err


def test_help_shows_an_example_and_the_process_exits_with_the_code(folder):
    result = CliRunner().invoke(cli.cli, ["evaluate", "--help"])
    assert result.exit_code == 0 and "granq evaluate resnet20_cifar10 --weight-bits 4" in result.output
    process = subprocess.run(
        [sys.executable, "-m", "granq_plugin", *arguments(folder, "--weight-bits", "four")], capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("granq: error: ")


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen([sys.executable, "-u", "-m", "granq_plugin", "zoo", "list"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, said = process.communicate()
    assert process.returncode == 1 and "error" not in said and "Traceback" not in said


def test_nothing_in_the_core_imports_the_extras():
    """The core install has torch, numpy and brevitas alone."""
    code = ("import sys, importlib.util\n"
            "for name in ('torchvision', 'click', 'tqdm', 'safetensors', 'onnx', 'matplotlib'): sys.modules[name] = None\n"
            "found = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *a: None if sys.modules.get(name, 1) is None else found(name, *a)\n"
            "import torch, granq_plugin as gq\n"
            "net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())\n"
            "print(gq.quantize(net)(torch.ones(1, 2)).shape)")
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "torch.Size([1, 2])", process.stderr


def test_digits_need_neither_data_nor_weights(tmp_path, capsys, monkeypatch):
    """The images come with scikit-learn, the teacher with the zoo, whatever GRANQ_DATA says."""
    monkeypatch.setenv("GRANQ_DATA", str(tmp_path / "nowhere"))
    card = zoo.get_card("resnet8_digits")
    code, _, err = run(["evaluate", card.name, "--weight-bits", 8, "--act-bits", 8, "--json", tmp_path / "out.json"], capsys)
    assert code == 0, err
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["float_top1"] == pytest.approx(100 * card.results.correct / card.results.images)
    assert report["weights_sha256"] == card.weights.sha256 and report["images"] == 359
    few = ("epochs=2", "iterations=1", "warmup_epochs=1", "batch_size=4", "memory_size=8", "replay_steps=1")
    code, _, err = run(["qat", card.name, "--out", tmp_path / "few", "--count", 20, *(f"--set={s}" for s in few)], capsys)
    assert code == 0 and json.loads((tmp_path / "few" / "run.json").read_text())["test_images"] == 20, err
    code, _, err = run(["qat", card.name, "--out", tmp_path / "run", *(f"--set={s}" for s in few)], capsys)
    assert code == 0, err
    entries = json.loads((tmp_path / "run" / "run.json").read_text())
    assert entries["teacher_weights_sha256"] == card.weights.sha256 and entries["test_images"] == 359
    code, _, err = run(["verify", tmp_path / "none.onnx", "--model", tmp_path / "run"], capsys)
    assert code == 2 and "does not exist" in err


def test_without_scikit_learn_the_digits_name_its_extra(capsys, monkeypatch):
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run(["evaluate", "resnet8_digits"], capsys)
    assert code == 2 and err.splitlines()[-1].endswith("sklearn is missing: pip install 'granq-plugin[zoo]'")


def complete(line):
    *words, incomplete = line.split(" ")
    return [item.value for item in ShellComplete(cli.cli, {}, "granq", "_GRANQ_COMPLETE").get_completions(words, incomplete)]


def test_shell_completion_knows_verbs_options_and_names(tmp_path):
    assert complete("re") == ["report"]
    assert "--weight-bits" in complete("qat resnet20_cifar10 --we")
    floats = complete("qat resnet")
    assert floats and all(zoo.get_card(name).quantization is None for name in floats)
    assert complete("zoo evaluate ") == zoo.list_models()
    assert complete("ranges resnet20_cifar10.granq_w4a4_") == zoo.list_models("resnet20_cifar10.granq_w4a4_*")
    assert complete("qat resnet8_digits --weight-bits 3 --preset digits") == ["digits_fast"]
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "mine.toml").write_text(zoo.get_card("resnet8_digits").to_toml())
    assert complete(f"zoo card --zoo {tmp_path} ") == ["mine"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell):
    process = subprocess.run([sys.executable, "-m", "granq_plugin"], capture_output=True, text=True,
                             env=os.environ | {"_GRANQ_COMPLETE": f"{shell}_source"})
    assert process.returncode == 0 and f"_GRANQ_COMPLETE={shell}_complete" in process.stdout


def test_ranges_of_zoo_entries_are_drawn(tmp_path, capsys):
    for name in ("resnet8_digits.granq_w3a3_folded", "resnet8_digits.granq_w3a3_static"):
        code, out, err = run(["ranges", name, "--out", tmp_path / f"{name}.png"], capsys)
        assert code == 0, err
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and name in out
    for name, message in (("resnet8_digits.granq_w3a3", "dynamic activations"), ("resnet8_digits", "is a float network"),
                          ("resnet9_digits", "no zoo entry 'resnet9_digits'"), (tmp_path, "holds no finished run")):
        code, _, err = run(["ranges", name, "--out", tmp_path / "none.png"], capsys)
        assert code == 2 and message in err and err.count("\n") == 1
    code, _, err = run(["ranges", "resnet8_digits.granq_w3a3_static", "--out", tmp_path / "none.txt"], capsys)
    assert code == 2 and "its name must end in .png, got" in err
    assert not list(tmp_path.glob("none.*"))


def test_the_folded_entry_s_ranges_are_those_that_were_folded():
    static, folded = static_and_folded("resnet8_digits.granq_w3a3_folded")
    scales, after = activation_scales(static), activation_scales(folded)
    assert set(after) <= set(scales) and max(map(len, scales.values())) > 1
    assert all(s.tolist() == [1.0] for name, s in after.items() if "input_quant" not in name)
    assert all(torch.equal(scales[n], after[n]) for n in after if "input_quant" in n)


def test_the_list_tells_where_weights_that_are_not_shipped_are_named(capsys):
    code, out, _ = run(["zoo", "list", NAME], capsys)
    assert code == 0 and out.rstrip().endswith(f"weights not shipped; source: granq zoo card {NAME}")
    assert "source = \"https://" in run(["zoo", "card", NAME], capsys)[1]
