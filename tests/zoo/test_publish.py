"""From a run's folder to a zoo entry and back: granq zoo add, evaluate, list, card."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from granq_plugin.cli import run as granq
from granq_plugin.zero_shot import ZeroShotConfig
from granq_plugin.zero_shot.outcome import save_tensors
from small_zoo import KINDS, SMALL, trained
from zoo.costs import costs
from zoo.evaluate import wilson_interval
from zoo.publish import _without_paths
from zoo.students import load_run

EXPORT = pytest.importorskip("qonnx", reason="qonnx (export extra) is not installed")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "test.npz", x=rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), y=rng.integers(0, 10, 60))
    return tmp_path


def finish_run(folder, quantization):
    """A folder as granq qat leaves it, without the training. Returns the network."""
    folder.mkdir()
    network, _ = trained(quantization)
    digest = save_tensors(folder / "student.safetensors", network.state_dict())
    (folder / "card.toml").write_text(SMALL.to_toml())
    (folder / "config.toml").write_text(ZeroShotConfig(epochs=7).to_toml())
    run = dict(network="card.toml", **dataclasses.asdict(quantization), student_sha256=digest, teacher_weights_sha256="a" * 64,
               images_sha256=None, version="9.9.9", float_top1=12.345)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.csv").write_text("epoch,agreement\n7,0.5\n")
    return network


@pytest.mark.parametrize("quantization", KINDS[:3], ids=lambda q: q.suffix)
def test_a_run_becomes_an_entry_that_is_evaluated_alike(data, capsys, quantization):
    network = finish_run(data / "run", quantization)
    add = ["zoo", "add", str(data / "run"), "--data", str(data), "--zoo", str(data / "zoo"), "--name"]
    name = f"small.{quantization.suffix}"
    assert granq(add[:-1]) == 2 and "give --name" in capsys.readouterr().err
    assert granq([*add, name]) == 0, capsys.readouterr().err
    card = zoo.get_card(name, data / "zoo")
    assert sorted(str(f.relative_to(data / "zoo")) for f in (data / "zoo").rglob("*.*")) == [
        f"cards/{name}.toml", f"configs/{name}.toml", f"logs/{name}.csv", f"pretrained/{name}.safetensors"]
    assert card.quantization == quantization and card.teacher.sha256 == "a" * 64 and card.training.epochs == 7
    assert card.results.float_top1 == 12.35 or card.results.float_top1 == 12.34
    assert str(data) not in card.to_toml() and "granq qat" in card.command
    model = zoo.get_model(name, pretrained=True, zoo_dir=data / "zoo")
    arrays = np.load(data / "test.npz")
    x = card.preprocessing(torch.from_numpy(arrays["x"].transpose(0, 3, 1, 2).copy()))
    with torch.no_grad():
        logits = network(x)
        assert torch.equal(model(x), logits)
    assert card.results.correct == int((logits.argmax(1).numpy() == arrays["y"]).sum())
    # evaluated from its files, and compared with the card
    evaluate = ["zoo", "evaluate", name, "--data", str(data), "--zoo", str(data / "zoo")]
    capsys.readouterr()
    assert granq(evaluate) == 0
    out, err = capsys.readouterr()
    low, high = wilson_interval(card.results.correct, 60)
    assert f"{card.results.top1:6.2f} %  (95 % interval {low:.2f} to {high:.2f})  {card.results.correct} of 60" in out
    assert "equal to the card" in out and "tolerance: equal counts" in out and "images/s" in out and not err
    wrong = dataclasses.replace(card, results=dataclasses.replace(
        card.results, correct=card.results.correct + 1, top1=round(100 * (card.results.correct + 1) / 60, 2)))
    (data / "zoo" / "cards" / f"{name}.toml").write_text(wrong.to_toml())
    assert granq(evaluate) == 1 and "differs from the card" in capsys.readouterr().out
    assert granq([*evaluate, "--tolerance", "1"]) == 0 and "tolerance: 1 images" in capsys.readouterr().out
    # an entry is not replaced by accident
    assert granq([*add, name]) == 2 and f"has an entry '{name}' with weights already; --overwrite" in capsys.readouterr().err
    assert granq([*add, name, "--overwrite"]) == 0 and zoo.get_card(name, data / "zoo") == card


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # curves of two iterations
def test_runs_of_one_s_own_network_become_entries(data, capsys, monkeypatch):
    """From granq qat on a card file, dynamic and then folded on its images, to entries with the runs' logits."""
    monkeypatch.delenv("GRANQ_DATA", raising=False)
    torch.manual_seed(0)
    torch.save(SMALL.build().state_dict(), data / "w.pt")
    (data / "mine.toml").write_text(SMALL.to_toml())
    short = [f"--set={s}" for s in ("image_size=8", "epochs=2", "iterations=1", "warmup_epochs=1", "batch_size=4", "memory_size=8",
                                    "replay_steps=0")]
    for kind in ("dynamic", "folded"):
        more = ["--images", str(data / "dynamic" / "images.safetensors")] if kind == "folded" else []
        assert granq(["qat", str(data / "mine.toml"), "--weights", str(data / "w.pt"), "--activations", kind, "--out",
                      str(data / kind), *short, *more]) == 0, capsys.readouterr().err
        student, network, _ = load_run(data / kind)
        assert student.card.architecture == SMALL.architecture and student.network == str(data / kind / "card.toml")
        name = f"mine.{student.quantization.suffix}"
        assert granq(["zoo", "add", str(data / kind), "--data", str(data), "--zoo", str(data / "zoo"), "--name", name]) == 0
        model, x = zoo.get_model(name, pretrained=True, zoo_dir=data / "zoo"), torch.randn(4, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(model(x), network(x))
    assert zoo.list_models(zoo_dir=data / "zoo") == ["mine.granq_w4a4", "mine.granq_w4a4_folded"]


def test_a_teacher_run_becomes_a_float_entry(data, capsys):
    folder = data / "teacher"
    folder.mkdir()
    torch.manual_seed(0)
    network = SMALL.build()
    digest = save_tensors(folder / "teacher.safetensors", network.state_dict())
    (folder / "card.toml").write_text(SMALL.to_toml())
    (folder / "config.toml").write_text("epochs = 3\n")
    (folder / "metrics.csv").write_text("epoch,loss\n3,0.5\n")
    run = dict(network="small", teacher_sha256=digest, command="granq train-teacher small --data /home/me/images --out /tmp/x/out",
               version="9.9.9")
    (folder / "run.json").write_text(json.dumps(run))
    add = ["zoo", "add", str(folder), "--data", str(data), "--zoo", str(data / "zoo"), "--name", "small"]
    assert granq(add) == 0, capsys.readouterr().err
    card, x = zoo.get_card("small", data / "zoo"), torch.randn(2, 3, 8, 8)
    assert card.command == "granq train-teacher small --data images --out out" and card.quantization is None
    assert torch.equal(zoo.get_model("small", pretrained=True, zoo_dir=data / "zoo")(x), network(x))
    capsys.readouterr()
    assert granq(["zoo", "list", "--zoo", str(data / "zoo")]) == 0 and "of    60" in capsys.readouterr().out
    assert granq(["zoo", "card", "small", "--zoo", str(data / "zoo")]) == 0 and capsys.readouterr().out == card.to_toml()
    (folder / "run.json").write_text(json.dumps(run | dict(teacher_sha256="0" * 64)))
    assert granq([*add, "--overwrite"]) == 2 and "does not have the SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True])
def test_writing_that_fails_leaves_everything_as_it_was(data, monkeypatch, capsys, overwrite):
    command = ["zoo", "add", str(data / "run"), "--data", str(data), "--zoo", str(data / "zoo"), "--name", "small.x"]
    if overwrite:
        finish_run(data / "run", KINDS[2])
        assert granq(command) == 0
        shutil.rmtree(data / "run")
    before = {f: f.read_bytes() for f in (data / "zoo").rglob("*.*")}
    finish_run(data / "run", KINDS[0])
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:4])
        if ".csv" in self.name:
            raise OSError(28, "No space left on device")
        write(self, content)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert granq([*command, *["--overwrite"] * overwrite]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert zoo.list_models(zoo_dir=data / "zoo") == ["small.x"] * overwrite
    assert {f: f.read_bytes() for f in (data / "zoo").rglob("*.*")} == before


def test_names_that_are_no_entries(data, capsys):
    finish_run(data / "run", KINDS[0])
    assert granq(["zoo", "add", str(data / "run"), "--data", str(data), "--zoo", str(data / "zoo"), "--name", "../x"]) == 2
    assert "name of an entry must be letters, digits, '_', '.' and '-', got '../x'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "run" / "student.safetensors").unlink(), "no finished run of granq qat"),
    (lambda f: np.savez(f / "test.npz", x=np.zeros((2, 9, 9, 3), np.uint8), y=np.zeros(2, int)), "images are 9x9, the network"),
    (lambda f: np.savez(f / "test.npz", x=np.zeros((2, 8, 8, 3), np.uint8), y=np.full(2, 10)), "from 10 to 10; allowed: 0 to 9"),
    (lambda f: (f / "test.npz").unlink(), "no cifar10 test images under"),
])
def test_bad_input_ends_before_anything_is_written(data, capsys, change, message):
    finish_run(data / "run", KINDS[0])
    change(data)
    assert granq(["zoo", "add", str(data / "run"), "--data", str(data), "--zoo", str(data / "zoo"), "--name", "small.x"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("granq: error: ") and message in err
    assert not (data / "zoo").exists()


@pytest.mark.parametrize("arguments, message", [
    (["evaluate", "resnet20_cifar"], "did you mean: resnet20_cifar10"),
    (["card", "resnet2"], "did you mean: resnet20_cifar10"),
    (["list", "vgg*"], "no zoo entry matches 'vgg*'"),
    (["evaluate", "resnet18_imagenet"], "ships no weights"),
])
def test_unknown_names(data, capsys, arguments, message):
    more = ["--data", str(data)] if arguments[0] == "evaluate" else []
    assert granq(["zoo", *arguments, *more]) == 2
    assert message in capsys.readouterr().err


def test_results_of_a_file_s_weights_go_into_the_card(data, capsys):
    (data / "small.toml").write_text(SMALL.to_toml())
    torch.manual_seed(0)
    torch.save(SMALL.build().state_dict(), data / "w.pt")
    command = ["zoo", "evaluate", str(data / "small.toml"), "--weights", str(data / "w.pt"), "--data", str(data)]
    assert granq(command) == 0 and "has no results" in capsys.readouterr().out
    assert granq([*command, "--update-card"]) == 0
    card = zoo.get_card(str(data / "small.toml"))
    assert card.results.images == 60 and len(card.teacher.sha256) == 64 and card.weights is None
    assert granq(command) == 0 and "equal to the card" in capsys.readouterr().out
    torch.save(SMALL.build().state_dict(), data / "w.pt")
    assert granq(command) == 0 and "of other weights" in capsys.readouterr().out


def test_costs_are_those_of_the_exported_file():
    float_costs = costs(SMALL.build(), SMALL.example_input())
    network, _ = trained(KINDS[0])
    quantized = costs(network, SMALL.example_input())
    assert quantized.macs == float_costs.macs and float_costs.bit_operations == 1024 * float_costs.macs
    assert quantized.weight_bytes == pytest.approx(float_costs.weight_bytes * 3 / 32, abs=1)


def test_commands_lose_the_machine_s_folders():
    assert _without_paths("granq x --data /a/b/cifar --out runs/a --set lr=1/2") == "granq x --data cifar --out runs/a --set lr=1/2"


def test_published_figures_are_whole():
    from zoo.tables import published
    rows = published()
    assert len(rows) == len({(r["network"], r["method"]) for r in rows}) == 37
    assert all(0 < r[b] <= r["float_top1"] for r in rows for b in ("W4A4", "W3A3") if r[b] is not None)
    assert next(r for r in rows if (r["network"], r["method"]) == ("resnet20_cifar100", "SynQ"))["W3A3"] == 57.28
