"""What a finished run leaves: a student that loads again, pictures, a summary."""

import json

import pytest
import torch
from safetensors.torch import load_file

import granq_plugin as gq
from granq_plugin.zero_shot import preset, zero_shot_qat
from granq_plugin.zero_shot.generator import Generator
from granq_plugin.zero_shot.outcome import save_outcome
from granq_plugin.zero_shot.plots import plot_curves, plot_images
from granq_plugin.zero_shot.recipe import ZeroShotResult
from networks import teacher_network

CONFIG = preset("cifar10", image_size=8, batch_size=8, epochs=3, iterations=2, warmup_epochs=1, student_lr=1e-2, memory_size=12)


def finished(folder, act_quant, **options):
    torch.manual_seed(0)
    teacher = teacher_network()
    student = gq.quantize(teacher, 3, 3, act_quant=act_quant)
    result = zero_shot_qat(student, teacher, CONFIG, run_dir=folder, evaluate=lambda n: 40.0, **options)
    save_outcome(folder, result, dict(network="small"), (0.5, ) * 3, (0.2, ) * 3)
    return teacher, result


@pytest.mark.parametrize("act_quant", [gq.GranQActPerChannel, gq.GranQActPerChannelStatic.let(learned_scale=True)])
def test_the_student_loads_again(tmp_path, act_quant):
    pytest.importorskip("matplotlib", reason="matplotlib (zoo extra) is not installed")
    teacher, result = finished(tmp_path, act_quant)
    again = gq.quantize(teacher, 3, 3, act_quant=act_quant)
    again.load_state_dict(load_file(tmp_path / "student.safetensors"))
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(again.eval()(x), result.student(x))
    assert torch.equal(load_file(tmp_path / "images.safetensors")["images"], result.images)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["network"] == "small" and len(run["student_sha256"]) == len(run["teacher_state_sha256"]) == 64
    for name in ("images.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part*"))


def test_pictures_undo_the_normalization(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (zoo extra) is not installed")
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    pixels = torch.rand(5, 3, 4, 4)
    plot_images((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), tmp_path / "i.png", mean, std)
    whole = torch.tensor(plt.imread(tmp_path / "i.png"))[..., :3].permute(2, 0, 1)
    factor = round(600 / 18)
    picture = whole[:, ::factor, ::factor]
    assert picture.shape == (3, 2 * 6, 3 * 6)
    assert torch.equal(whole, picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2))  # enlarged, not smoothed
    torch.testing.assert_close(picture[:, 6:10, 6:10], pixels[4], rtol=0, atol=1 / 254)


@pytest.mark.parametrize("classes, columns", [(3, 3), (16, 16), (17, 8)])
def test_columns_are_classes_with_their_names_above(tmp_path, monkeypatch, classes, columns):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (zoo extra) is not installed")
    asked = {}
    monkeypatch.setattr(
        "granq_plugin.zero_shot.outcome.plot_images", lambda images, path, *_, **how: asked.update(how, n=len(images)))
    student = torch.nn.Linear(1, 1)
    (tmp_path / "run.json").write_text("{}")
    save_outcome(tmp_path, ZeroShotResult(student, Generator(8, classes), [], torch.empty(0)), {}, (0.5, ) * 3, (0.2, ) * 3)
    assert asked["n"] == 64 // columns * columns and asked["columns"] == (classes if classes < 17 else None)
    assert asked["headings"] == ([str(c) for c in range(classes)] if classes < 17 else [])
    plot_images(torch.zeros(4, 1, 8, 8), tmp_path / "i.png", (0.5, ), (0.2, ), 2, ["0", "1"])
    picture = torch.tensor(plt.imread(tmp_path / "i.png"))[..., 0]
    factor = round(600 / 20)
    above = picture[:-20 * factor]
    assert picture.shape == (20 * factor + 22, 20 * factor) and all((half < 0.5).any() for half in above.chunk(2, 1))
    plot_images(torch.zeros(4, 2, 8, 8), tmp_path / "two.png", (0.5, 0.1), (0.2, 0.3), 2, ["0", "1"])  # the first channel
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "i.png").read_bytes()


def test_curves_have_panels_for_what_there_is_in_words(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (zoo extra) is not installed")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)  # to look at it
    rows = [dict(iterations=i, loss_student=0.6 / i, agreement=0.5) for i in (1, 2, 3)]
    more = [row | dict(loss_generator=1.0, loss_bn=0.5, accuracy=50.0, loss_student=row["loss_student"] ** 9) for row in rows]
    for name, metrics, panels in (("few", rows, 2), ("all", more, 3), ("none", [], 2)):
        plot_curves(metrics, tmp_path / f"{name}.png")
        figure = drawn[-1]
        figure.canvas.draw()
        assert len(figure.axes) == panels
        assert ("loss of the generator" in [a.get_title() for a in figure.axes]) == (name == "all")
        words = [text.get_text() for a in figure.axes if a.get_legend() for text in a.get_legend().get_texts()]
        assert not any(word.replace(" ", "_") in more[0] for word in words) and (len(words) == 5 if name == "all" else True)
        for a in figure.axes:
            assert not any("10^" in tick.get_text() for which in ("major", "minor") for tick in a.get_yticklabels(which=which))
            title, box = a.title.get_window_extent(), a.get_window_extent()
            assert title.width < box.width
    monkeypatch.undo()
    plt.close("all")
