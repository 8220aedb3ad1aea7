"""Students are described, built, trained and found again."""

import json
import sys

import pytest
import torch

from benchmarks.export_ladder import LADDER_FIELDS, ladder_table, rungs_of_run
from granq_plugin.cli import run as granq
from granq_plugin.deploy import bake, clear_ties
from zoo.data import ImageSet
from zoo.quantization import ACTIVATIONS, Quantization
from zoo.registry import get_card
from zoo.students import Student, calibrated_network, calibrator, load_run

NAME = "resnet20_cifar10"
SHORT = [f"--set={s}" for s in (
    "epochs=2", "iterations=1", "warmup_epochs=1", "batch_size=4", "memory_size=8", "replay_steps=0", "student_lr=1e-3")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One finished run of each kind of activations, on random weights; the folded one on the images of the first."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    torch.save(get_card(NAME).build().state_dict(), folder / "w.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GRANQ_DATA", raising=False)  # or each run is evaluated on 10,000 images
        for kind in ACTIVATIONS:
            more = ["--images", str(folder / "dynamic" / "images.safetensors")] if kind == "folded" else []
            assert granq(["qat", NAME, "--weights", str(folder / "w.pt"), "--weight-bits", "3", "--act-bits", "4", "--activations",
                          kind, "--out", str(folder / kind), *SHORT, *more]) == 0
    return folder


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_run_is_found_again(runs, kind):
    student, network, run = load_run(runs / kind)
    assert student == Student(
        NAME, Quantization(3, 4, "per-output-channel-symmetric" if kind == "folded" else "per-output-channel", kind))
    assert len(run["teacher_weights_sha256"]) == 64 and (run["images_sha256"] is None) == (kind != "folded")
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        y = network(x)
        assert torch.isfinite(y).all() and torch.equal(y, load_run(runs / kind)[1](x))
    checkpoint = torch.load(runs / kind / "checkpoint.pt", weights_only=True)
    names = [n for n in checkpoint["student"] if n.endswith("linear.weight") or n.endswith("conv1.weight")]
    assert names or kind == "folded"
    for name in names:
        assert torch.equal(dict(network.state_dict())[name], checkpoint["student"][name]), name


def test_what_is_deployed_is_what_was_trained_cleared_of_ties(runs):
    student, network, _ = load_run(runs / "folded")
    trained = student.quantization.build(
        get_card(NAME).build(), student.example_input(), lambda prepared: calibrated_network(runs / "folded"))
    trained.load_state_dict(torch.load(runs / "folded" / "checkpoint.pt", weights_only=True)["student"])
    deployed = student.quantization.deployed(trained, student.example_input())
    assert deployed.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in deployed.state_dict().items() if isinstance(v, torch.Tensor))
    cleared, layers = clear_ties(bake(trained), student.example_input())
    assert min(layer.margin for layer in layers) > 1e-6 > min(layer.margin_before for layer in layers)
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(cleared(x), network(x))
    assert load_run(runs / "static")[0].quantization.deployed(network, student.example_input()) is network


def test_rungs_of_the_ladder(runs):
    """Each run on eight images; of the folded one the network and its file, which agree on all of them."""
    images = ImageSet(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8), "drawn")
    rows = [row for kind in ACTIVATIONS for row in rungs_of_run(runs / kind, images, runs / "w.pt")]
    assert [r["rung"] for r in rows] == ["dynamic", "static", "folded", "exported file"] and set(rows[0]) == set(LADDER_FIELDS)
    assert rows[3]["same_top1_as_folded"] == 8 and rows[2]["correct"] == rows[3]["correct"]
    assert [r["training"] for r in rows] == ["2 x 4, its generator's images"] * 2 + ["2 x 4, another run's images"] * 2
    assert [line.split("|")[3].strip() for line in ladder_table(rows[::-1])[3:]] == [r["rung"] for r in rows]
    torch.save(get_card(NAME).build().state_dict(), runs / "other.pt")
    with pytest.raises(ValueError, match="has another teacher than"):
        rungs_of_run(runs / "static", images, runs / "other.pt")


def test_a_damaged_student_is_refused(runs, tmp_path):
    for name in ("run.json", "student.safetensors"):
        (tmp_path / name).write_bytes((runs / "static" / name).read_bytes())
    load_run(tmp_path)
    data = bytearray((tmp_path / "student.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "student.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="does not have the SHA-256"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json' is not a readable JSON file"):
        load_run(tmp_path)
    whole = json.loads((runs / "static" / "run.json").read_text())
    for change in (dict(network=5), dict(network="../other/card.toml"), dict(act_bit_width="4"), dict(learned_scale="yes")):
        (tmp_path / "run.json").write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match="run.json' is not what granq qat writes"):
            load_run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_run(tmp_path)


def test_only_folded_runs_have_a_network_before_folding(runs):
    assert calibrated_network(runs / "folded") is not None
    with pytest.raises(ValueError, match="nothing was folded"):
        calibrated_network(runs / "static")


@pytest.mark.parametrize("settings, message", [
    (dict(weight_regime="per-tensor"), "weight_regime must be one of per-output-channel, "),
    (dict(activations="fixed"), "activations must be one of dynamic, static, folded, got 'fixed'"),
    (dict(learned_scale=True), "learned_scale needs static activations, got dynamic"),
    (dict(weight_range_mode="max"), "weight_range_mode must be one of minmax, mse, got 'max'"),
    (dict(activations="static", act_range_mode="max"), "act_range_mode must be one of ema, minmax, mse, got 'max'"),
    (dict(act_range_mode="mse"), "dynamic activations collect no ranges, got act_range_mode='mse'"),
    (dict(weight_regime="per-kernel", weight_range_mode="mse"), "per-kernel weights have minmax ranges"),
    (dict(activations="folded"), "folded activations need per-output-channel-symmetric weights"),
])
def test_students_that_make_no_sense(settings, message):
    with pytest.raises(ValueError) as error:
        Student(NAME, Quantization(3, 3, **settings))
    assert message in str(error.value)


def test_folded_students_need_ranges():
    card, quantization = get_card(NAME), Quantization(4, 4, "per-output-channel-symmetric", "folded")
    teacher, example = card.build(), card.example_input()
    with pytest.raises(ValueError, match="need ranges first"):
        quantization.build(teacher, example)
    network = quantization.build(teacher, example, calibrator([torch.randn(2, 3, 32, 32)]))
    assert torch.isfinite(network.eval()(torch.randn(1, 3, 32, 32))).all()


def test_export_verify_and_report(runs, tmp_path, capsys, monkeypatch, data_dir):
    """The commands, on the folded run: exported in every format, equal to torch, counted."""
    for file_format in ("qonnx", "qcdq", "finn"):
        file = tmp_path / f"{file_format}.onnx"
        assert granq(["export", str(runs / "folded"), "--format", file_format, "--out", str(file)]) == 0
        assert granq(["verify", str(file), "--model", str(runs / "folded"), "--data", str(data_dir), "--count", "4",
                      "--executor", "onnxruntime"]) == 0
    assert "same top-1 4" in capsys.readouterr().out
    verify = ["verify", str(file), "--data", str(data_dir), "--count", "4", "--executor"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "hls4ml", None)
        assert granq([*verify, "hls4ml", "--model", str(runs / "folded")]) == 2
    assert "the package hls4ml is missing: pip install 'granq-plugin[hls]'" in capsys.readouterr().err
    content = file.read_bytes()
    changed = content.replace(b"conv1", b"conv2", 1)
    for damaged, message in ((content[:-100], "not a readable ONNX model"), (changed, "was changed")):
        (tmp_path / "damaged.onnx").write_bytes(damaged)
        arguments = ["verify", str(tmp_path / "damaged.onnx"), *verify[2:], "onnxruntime", "--model", str(runs / "folded")]
        assert granq(arguments) == 2
        assert message in capsys.readouterr().err
    assert granq(["report", str(tmp_path / "qcdq.onnx")]) == 0
    out = capsys.readouterr().out
    assert "40,813,184" in out and "at float32" in out


@pytest.mark.parametrize("arguments, message", [
    (["export", "{dynamic}", "--format", "finn", "--out", "{tmp}/x.onnx"],
     f"are dynamic; train one: granq qat {NAME} --activations folded --images {{dynamic}}/images.safetensors --weights FILE"),
    (["export", "{static}", "--format", "finn", "--out", "{tmp}/x.onnx"], "needs a run with folded"),
    (["export", "{tmp}", "--format", "qcdq", "--out", "{tmp}/x.onnx"], "holds no finished run"),
    (["export", "{static}", "--format", "qcdq", "--out", "{tmp}/no/x.onnx"], "its folder does not exist"),
    (["export", "{folded}", "--format", "finn", "--out", "/proc/x.onnx"], "cannot write"),
    (["export", "{static}", "--format", "qcdq", "--top-k", "1", "--out", "{tmp}/x.onnx"], "--top-k needs --format finn"),
    (["export", "{folded}", "--format", "finn", "--dynamo", "--out", "{tmp}/x.onnx"], "older exporter"),
    (["report", "{tmp}/none.onnx"], "does not exist"),
])
def test_exports_that_cannot_be(runs, tmp_path, capsys, arguments, message):
    places = {kind: runs / kind for kind in ACTIVATIONS} | dict(tmp=tmp_path)
    assert granq([a.format(**places) for a in arguments]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_lacks_its_images(runs, capsys):
    assert granq(["qat", NAME, "--weights", str(runs / "w.pt"), "--activations", "folded", "--out", str(runs / "x")]) == 2
    assert "--activations folded needs --images FILE" in capsys.readouterr().err and not (runs / "x").exists()


def test_run_json_is_plain(runs):
    run = json.loads((runs / "dynamic" / "run.json").read_text())
    assert {"network", "weight_bit_width", "act_bit_width", "weight_regime", "activations", "teacher_state_sha256"} <= set(run)


def test_a_network_of_the_working_folder_goes_all_the_way(tmp_path, monkeypatch, capsys):
    """module:function, trained, evaluated and exported, with nothing on the path but what the command line puts there."""
    (tmp_path / "nets_of_this_folder.py").write_text(
        "from torch import nn\ndef net(num_classes):\n    return nn.Sequential(\n        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), "
        "nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delenv("GRANQ_DATA", raising=False)
    sys.path.append(str(tmp_path))
    from nets_of_this_folder import net
    torch.save(net(10).state_dict(), "w.pt")
    sys.path.remove(str(tmp_path))
    del sys.modules["nets_of_this_folder"]
    assert granq(["qat", "nets_of_this_folder:net", "--dataset", "digits", "--weights", "w.pt", "--out", "run", *SHORT]) == 0
    said = capsys.readouterr().err
    assert said.index("float net: top-1 ") < said.index("epoch 1/2")  # before it trains
    for command in (["export", "run", "--format", "qcdq", "--out", "net.onnx"],
                    ["evaluate", "run/card.toml", "--weights", "w.pt"]):
        del sys.modules["nets_of_this_folder"]
        assert granq(command) == 0, command
    del sys.modules["nets_of_this_folder"]
    assert granq(["train-teacher", "nets_of_this_folder:net", "--dataset", "digits", "--out", "taught", "--set=epochs=1"]) == 0
    assert granq(["evaluate", "taught/card.toml", "--weights", "taught/teacher.safetensors"]) == 0
    assert granq(["zoo", "add", "taught", "--zoo", "zoo"]) == 2 and "give --name for its entry" in capsys.readouterr().err
    assert granq(["zoo", "add", "taught", "--zoo", "zoo", "--name", "net"]) == 0
    assert granq(["zoo", "card", "nets_of_this_folder:net"]) == 2
    assert "is no zoo entry: module:function is for granq evaluate, qat and train-teacher" in " ".join(
        capsys.readouterr().err.split())
    # the same network with more classes: settings follow the card, and those that are given must fit it
    (tmp_path / "more.toml").write_text((tmp_path / "run/card.toml").read_text().replace("num_classes = 10", "num_classes = 12"))
    torch.save(net(12).state_dict(), "w12.pt")
    for settings, code in ([], 0), (["--preset", "digits_fast", "--set=num_classes=10"], 2), (["--preset", "cifar10_fast"], 0):
        out = f"run{len(settings)}"
        assert granq(["qat", "more.toml", "--weights", "w12.pt", "--out", out, *SHORT, *settings]) == code
        if code:
            assert "num_classes is set to 10, more has 12" in capsys.readouterr().err
    # data of one's own, of which nothing is known but what the card says
    (tmp_path / "own.toml").write_text((tmp_path / "more.toml").read_text().replace('"digits"', '"my_data"'))
    assert granq(["qat", "own.toml", "--weights", "w12.pt", "--out", "own", *SHORT]) == 0
    assert "own: takes images normalized with mean " in capsys.readouterr().err
    student, network, _ = load_run("own")
    assert network(student.example_input()).shape[1:] == (12, )
    assert granq(["export", "own", "--format", "qcdq", "--out", "own.onnx"]) == 0
    assert granq(["verify", "own.onnx", "--model", "own", "--images", "own/images.safetensors", "--threads", "1"]) == 0
