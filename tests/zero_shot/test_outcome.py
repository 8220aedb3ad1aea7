"""What a finished run leaves: a student that loads again, pictures, a summary."""

import json

import pytest
import torch
from safetensors.torch import load_file

import granq_plugin as gq
from granq_plugin.zero_shot import preset, zero_shot_qat
from granq_plugin.zero_shot.outcome import save_outcome
from granq_plugin.zero_shot.plots import plot_images
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
    picture = torch.tensor(plt.imread(tmp_path / "i.png"))[::2, ::2, :3].permute(2, 0, 1)
    assert picture.shape == (3, 2 * 6, 3 * 6)
    torch.testing.assert_close(picture[:, 6:10, 6:10], pixels[4], rtol=0, atol=1 / 254)
