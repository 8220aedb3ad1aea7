"""granq demo, with a few iterations: what it reports, its page, and folders that it goes on in or refuses."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from granq_plugin.cli import demo as verb
from granq_plugin.cli import run as granq
from granq_plugin.zero_shot import preset
from zoo.data import load_digits
from zoo.demo import run_demo
from zoo.demo.folder import open_folder
from zoo.demo.page import page

FEW = dict(epochs=2, iterations=2, warmup_epochs=1, batch_size=8, memory_size=32, replay_steps=1, checkpoint_every=1)
COUNT = 40


def few(out, **more):
    return run_demo(out, 3, 4, config=preset("digits_fast", **FEW), test_set=load_digits().subset(COUNT), **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, the report, and for each stage ``[total, done]``."""
    out, stages = tmp_path_factory.mktemp("demo") / "out", {}

    def stage(words, total):
        stages[words] = [total, 0]

        def update(done):
            stages[words][1] += done
        return update
    return out, few(out, stage=stage), stages


def test_the_report_holds_what_was_measured(finished):
    out, report, stages = finished
    assert json.loads((out / "report.json").read_text()) == report
    assert [step["key"] for step in report["ladder"]] == ["float", "before", "dynamic", "static", "folded_before", "folded"]
    for step in report["ladder"]:
        assert step["top1"] == pytest.approx(100 * step["correct"] / COUNT) and step["low"] < step["top1"] <= step["high"]
    assert report["bits"] == "W3A4" and report["test_images"] == COUNT and not report["resumed"]
    assert len(stages) == 4 and all(total == done for total, done in stages.values())
    assert report["costs"]["network"]["weight_bytes"] == report["costs"]["at_float32"]["weight_bytes"] * 3 / 32


def test_the_exported_files_compute_what_torch_does(finished):
    report = finished[1]
    assert [e["executor"] for v in report["verification"] for e in v["executors"]] == ["onnxruntime", "qonnx", "onnxruntime"]
    for v in report["verification"]:
        assert v["agrees"]
        for e in v["executors"]:
            assert e["images"] == e["close"] == e["top1"] == COUNT and e["correct"] == report["ladder"][-1]["correct"]
            assert e["integers"] is None or e["integers"]["unequal"] == 0
    assert len(report["finn"]) > 10 and all(rule["passed"] for rule in report["finn"])


class Page(HTMLParser):
    """Tags that are open, and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.images = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [v for k, v in attrs.items() if k in ("src", "srcset", "href", "data", "action")]
        self.images += [attrs] if tag == "img" else []
        self.open += [tag] if tag not in ("meta", "img", "source", "br") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(finished):
    out, report, _ = finished
    text = (out / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == [] and len(parsed.images) == 4 and all(image["alt"] for image in parsed.images)
    assert all(a.startswith("data:image/png;base64,") for a in parsed.addresses) and "url(" not in text and "@import" not in text
    assert "before folding in the upper panel" in text and not re.search(r"Left:|Right:|several orders", text)  # they are stacked
    for step in report["ladder"]:
        assert f"{step['top1']:.2f} %" in text and f"{step['correct']} of {COUNT}" in text


def test_the_page_escapes_what_it_is_given(finished):
    out, report, _ = finished
    names = ("generated", "real", "ladder", "ranges", "ladder_dark", "ranges_dark")
    text = page(report | dict(network="<script>alert(1)</script>"), {name: out / f"{name}.png" for name in names})
    assert "<script" not in text and "&lt;script&gt;" in text


def test_a_second_start_goes_on(finished):
    """A stage killed before its first file is made anew, a finished one is not trained again, parts of files disappear."""
    out, report, _ = finished
    (out / "folded" / "run.json").unlink()
    (out / "report.html.part123").write_text("half")
    before = (out / "dynamic" / "checkpoint.pt").read_bytes()
    again = few(out)
    assert again["resumed"] and again["ladder"] == report["ladder"] and again["seconds"] == report["seconds"]
    assert (out / "dynamic" / "checkpoint.pt").read_bytes() == before
    assert not list(out.rglob("*.part*"))


def test_folders_that_are_refused(tmp_path):
    identity = dict(bits="W3A3", version="1")
    assert open_folder(tmp_path / "new" / "deep", identity, ()) is False
    assert open_folder(tmp_path / "new" / "deep", identity, ()) is True
    with pytest.raises(FileExistsError, match=r"holds another demo \(bits W3A3, version 1\): choose another --out"):
        open_folder(tmp_path / "new" / "deep", identity | dict(bits="W4A4"), ())
    (tmp_path / "new" / "deep" / "demo.json").write_text("{")
    with pytest.raises(FileExistsError, match="cannot be read"):
        open_folder(tmp_path / "new" / "deep", identity, ())
    with pytest.raises(FileExistsError, match="is not empty and holds no demo"):
        open_folder(tmp_path, identity, ())
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_folder(tmp_path / "file", identity, ())


def test_a_demo_killed_before_its_first_file_starts(tmp_path):
    (tmp_path / "demo.json.part77").write_text("{")
    assert open_folder(tmp_path, dict(bits="W3A3"), ()) is False


def test_the_command_prints_the_numbers_and_the_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr("zoo.demo.pipeline.preset", lambda name: preset(name, **FEW))
    monkeypatch.setattr("zoo.demo.pipeline.load_images", lambda *_: load_digits().subset(COUNT))
    assert granq(["demo"]) == 0
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert "with static ranges: 50 %" in err and "verifying the exported files: 100 %" in err  # no terminal: lines
    report = json.loads((tmp_path / "granq-demo" / "report.json").read_text())
    for step in report["ladder"]:
        assert re.search(rf" {step['top1']:.2f} %", out)
    assert str(tmp_path / "granq-demo" / "report.html") in out


@pytest.mark.parametrize("arguments, message", [
    (["--weight-bits", "1"], "1 is not in the range 2<=x<=8"),
    (["--act-bits", "x"], "'x' is not a valid integer"),
    (["--out", "{tmp}"], "is not empty and holds no demo"),
])
def test_bad_input(tmp_path, capsys, arguments, message):
    (tmp_path / "mine.txt").write_text("")
    assert granq(["demo", *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    assert message in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verb, "find_spec", lambda name: None if name in ("sklearn", "qonnx") else object(), raising=False)
    assert granq(["demo", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "granq demo needs scikit-learn, qonnx: pip install 'granq-plugin[demo]'" in error and not (tmp_path / "x").exists()
