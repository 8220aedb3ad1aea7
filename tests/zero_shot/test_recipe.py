"""Whole runs on a small teacher: what they change, what they refuse, and what they survive."""

import copy
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import granq_plugin as gq
from granq_plugin.core.ranges import CollectedRange
from granq_plugin.zero_shot import preset, zero_shot_qat
from granq_plugin.zero_shot.training import Training, learned_scales
from networks import teacher_network

CONFIG = preset("cifar10", image_size=8, batch_size=8, epochs=3, iterations=4, warmup_epochs=1, student_lr=1e-2)


def changed(**settings):
    return CONFIG.replace(**settings)


def pair(act_quant=gq.GranQActPerChannel, **options):
    torch.manual_seed(0)
    teacher = teacher_network()
    return gq.quantize(teacher, 3, 3, act_quant=act_quant, **options), teacher


def states(*networks):
    return [{k: v.clone() for k, v in n.state_dict().items() if v is not None} for n in networks]


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=0, msg=name)


def test_the_student_learns_and_the_teacher_stays():
    student, teacher = pair()
    teacher.train()
    next(teacher.parameters()).requires_grad_(False)
    before_student, before_teacher = states(student, teacher)
    config = preset("cifar10", image_size=8, batch_size=32, epochs=12, iterations=10, warmup_epochs=2, student_lr=3e-3,
                    lr_schedule="cosine")
    result = zero_shot_qat(student, teacher, config)
    losses = [row["loss_student"] for row in result.metrics]
    assert losses[-1] < 0.7 * losses[1], losses
    assert result.metrics[-1]["loss_bn"] < 0.7 * result.metrics[0]["loss_bn"]
    assert_same_state(before_teacher, teacher.state_dict())
    assert teacher.training and all(m.training for m in teacher.modules())
    assert [p.requires_grad for p in teacher.parameters()] == [False] + [True] * (len(list(teacher.parameters())) - 1)
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    assert result.student is student and not student.training
    for name, value in student.state_dict().items():
        is_statistic = "running_" in name or "num_batches" in name
        assert torch.equal(value, before_student[name]) == is_statistic, name


def test_only_the_generator_learns_in_the_warm_up():
    student, teacher = pair()
    before, = states(student)
    seen = []
    zero_shot_qat(student, teacher, CONFIG, on_iteration=lambda done, log: seen.append(
        (done, all(torch.equal(v, before[k]) for k, v in student.state_dict().items()))))
    assert seen == [(i + 1, i < 4) for i in range(12)]


def test_the_student_s_learning_rate_rises_over_its_first_iterations():
    training = Training(*pair(), changed(student_lr_warmup=4), None)
    for expected in (0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1):
        training.step()
        assert training.optimizer.param_groups[0]["lr"] == pytest.approx(expected * CONFIG.student_lr)
    training.close()


BEYOND = dict(memory_size=20, replay_steps=1, student_optimizer="adam", feature_loss="features", ema_decay=0.9, sam_rho=0.1,
              low_pass=3.0)
AUGMENTED = dict(memory_size=30, replay_steps=1, image_gain=1.5, image_shift=1, image_flip=True)


@pytest.mark.parametrize("options", [{}, dict(memory_size=20, replay_steps=2), dict(accumulation_steps=2), BEYOND, AUGMENTED])
@pytest.mark.parametrize("act_quant", [gq.GranQActPerChannel, gq.GranQActPerChannelStatic.let(learned_scale=True)])
def test_same_seed_same_result(act_quant, options):
    config = changed(**options)
    results = []
    for seed in (0, 0, 1):
        student, teacher = pair(act_quant)
        torch.manual_seed(random.randrange(1000))  # the global random state plays no part
        zero_shot_qat(student, teacher, config.replace(seed=seed))
        results += states(student)
    assert_same_state(results[0], results[1])
    assert any(not torch.equal(results[0][k], results[2][k]) for k in results[0])


def test_global_random_state_is_left_alone():
    student, teacher = pair()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    zero_shot_qat(student, teacher, CONFIG)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("learned_scale", [False, True])
def test_static_ranges_follow_then_freeze(learned_scale):
    student, teacher = pair(gq.GranQActPerChannelStatic.let(learned_scale=learned_scale))
    collectors = [m for m in student.modules() if isinstance(m, CollectedRange)]
    seen = []
    config = changed(epochs=4, range_epochs=1)
    zero_shot_qat(student, teacher, config, on_iteration=lambda *_: seen.append(
        ([c.running_max.clone() for c in collectors], [c.frozen for c in collectors])))
    moved = [any(not torch.equal(a, b) for a, b in zip(seen[i][0], seen[i - 1][0])) for i in range(1, 16)]
    assert moved == [True] * 7 + [False] * 8  # warm-up and one epoch
    assert [all(s[1]) for s in seen] == [False] * 8 + [True] * 8
    scales = [p for n, p in student.named_parameters() if n.endswith("learned_scale")]
    assert len(scales) == (len(collectors) if learned_scale else 0)
    for scale, collector in zip(scales, collectors):
        initial = (collector.running_max - collector.running_min.clamp_max(0)).clamp_min(1e-8) / 7
        assert not torch.allclose(scale, initial, rtol=1e-6, atol=0)


def test_calibrated_ranges_stay_frozen():
    student, teacher = pair()
    student = gq.to_static(student, [torch.randn(4, 3, 8, 8)])
    before = states(student)[0]
    zero_shot_qat(student, teacher, CONFIG)
    for name, value in student.state_dict().items():
        if "running_m" in name and "scaling_impl" in name:
            assert torch.equal(value, before[name]), name


def test_images_of_another_run_instead_of_a_generator():
    student, teacher = pair()
    config = changed(memory_size=40)
    first = zero_shot_qat(student, teacher, config)
    assert first.images.shape == (40, 3, 8, 8) and first.images.dtype == torch.float16
    second, _ = pair()
    result = zero_shot_qat(second, teacher, changed(epochs=20), images=first.images)
    assert result.generator is None and len(result.images) == 40
    assert result.metrics[-1]["loss_student"] < result.metrics[0]["loss_student"]
    assert "loss_bn" not in result.metrics[0] and result.metrics[0]["epoch"] == 1
    for r, words in ((first, "ZeroShotResult of 12 iterations, with a generator"), (result, "80 iterations, without a generator")):
        lines = repr(r).splitlines()
        assert len(lines) == 3 and lines[0].endswith(words) and "agreement 0." in lines[1] and lines[2] == "  images: 40"


@pytest.mark.parametrize("options", [{}, dict(ema_decay=0.9)])
def test_learned_scales_get_headroom_at_the_end_alone(tmp_path, options):
    """Evaluations see it, training does not; a run that is resumed after its end has it once."""
    act = gq.GranQActPerChannelStatic.let(learned_scale=True)
    config, seen = changed(range_epochs=1, **options), []

    def evaluate(network) -> float:
        seen.append(torch.cat([s.detach().flatten().clone() for s in learned_scales(network)]))
        return 0.0
    states = []
    for headroom in (1.0, 1.5):
        student, teacher = pair(act)
        zero_shot_qat(
            student, teacher, config.replace(scale_headroom=headroom), evaluate=evaluate, run_dir=tmp_path / f"{headroom}")
        states.append(student.state_dict())
    scales = [name for name in states[0] if name.endswith("learned_scale")]
    assert len(scales) == len(learned_scales(student)) > 0 and len(seen) == 6
    for name, value in states[0].items():
        if value is not None:
            torch.testing.assert_close(states[1][name], value * 1.5 if name in scales else value, rtol=0, atol=0, msg=name)
    assert all(torch.equal(b, 1.5 * a) for a, b in zip(seen[:3], seen[3:]))
    student, teacher = pair(act)
    zero_shot_qat(student, teacher, config.replace(scale_headroom=1.5), run_dir=tmp_path / "1.5", resume=True)
    assert_same_state(states[1], student.state_dict())


def test_headroom_needs_learned_scales():
    student, teacher = pair(gq.GranQActPerChannelStatic)
    with pytest.raises(ValueError, match="scale_headroom=1.2 is for learned scales, and the student has none"):
        zero_shot_qat(student, teacher, changed(scale_headroom=1.2))


def test_memory_keeps_the_latest_images():
    from granq_plugin.zero_shot.memory import ImageMemory
    memory = ImageMemory(5)
    for start in range(0, 12, 3):
        values = torch.arange(start, start + 3, dtype=torch.float32)
        memory.add(values.view(3, 1, 1, 1), values.view(3, 1))
    assert sorted(memory.images().flatten().tolist()) == [7, 8, 9, 10, 11]
    images, logits = memory.draw(50, torch.Generator().manual_seed(0))
    assert torch.equal(images.flatten(), logits.flatten()) and len(images.unique()) == 5


def test_accuracy_is_recorded_and_influences_nothing():
    runs = []
    for options in ({}, dict(evaluate=lambda n: (assert_evaluating(n), 12.5)[1], evaluate_every=2)):
        student, teacher = pair(gq.GranQActPerChannelStatic)
        rows = []
        result = zero_shot_qat(student, teacher, CONFIG, on_epoch=rows.append, **options)
        assert rows == result.metrics
        runs.append((states(student)[0], [row.get("accuracy") for row in rows]))
    assert_same_state(runs[0][0], runs[1][0])
    assert [r[1] for r in runs] == [[None] * 3, [None, 12.5, 12.5]]


def assert_evaluating(network) -> None:
    assert not any(m.training for m in network.modules())


@pytest.mark.parametrize("options", [dict(channels_last=False), dict(bf16=True), dict(compile="default")])
def test_options_of_computing_change_little(options, compiler):
    config = changed(epochs=2, iterations=2, student_lr=1e-4)
    results = []
    for extra in ({}, options):
        student, teacher = pair()
        results.append(zero_shot_qat(student, teacher, config.replace(**extra)).metrics[-1])
    tolerance = 0.5 if "bf16" in options else 0.02  # the generator has taken two steps, and processors round bf16 in their own ways
    for name in ("loss_generator", "loss_bn", "loss_student"):
        assert results[1][name] == pytest.approx(results[0][name], rel=tolerance), name


@pytest.mark.parametrize("optimizer", ["generator_optimizer", "sgd", "adam"])
def test_an_update_does_not_depend_on_how_a_gradient_lies_in_memory(optimizer):
    """torch's fused optimizers pair values by their places in memory."""
    from granq_plugin.zero_shot.training import Training, update_parameters
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        student, teacher = pair()
        training = Training(student, teacher.requires_grad_(False), CONFIG.replace(
            student_optimizer="adam" if optimizer == "adam" else "sgd"), None)
        own = training.generator_optimizer if optimizer == "generator_optimizer" else training.optimizer
        params = [p for p in (training.generator if optimizer == "generator_optimizer" else student).parameters() if p.dim() == 4]
        before = [p.detach().clone() for p in params]
        for _ in range(2):
            grads = [torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p) for p in params]
            update_parameters(own, params, [g.contiguous(memory_format=memory_format) for g in grads])
        results.append([p.detach() - b for p, b in zip(params, before)])
    assert len(params) > 1 and min(float(step.abs().max()) for step in results[0]) > 0
    for a, b in zip(*results):
        assert torch.equal(a, b)


class TestRunDirectory:
    def test_what_it_holds(self, tmp_path):
        student, teacher = pair()
        result = zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path / "a" / "run", evaluate=lambda n: 50.0)
        folder = tmp_path / "a" / "run"
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.toml", "metrics.csv", "run.json"]
        with open(folder / "metrics.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        assert [int(r["epoch"]) for r in rows] == [1, 2, 3] and float(rows[-1]["accuracy"]) == 50
        assert float(rows[1]["loss_student"]) == result.metrics[1]["loss_student"]
        assert type(CONFIG).from_file(folder / "config.toml") == CONFIG
        assert len(json.loads((folder / "run.json").read_text())["teacher_state_sha256"]) == 64

    def test_a_finished_run_is_not_trained_again(self, tmp_path):
        student, teacher = pair()
        first = zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path)
        expected, = states(student)
        student, teacher = pair()
        again = zero_shot_qat(
            student, teacher, CONFIG, run_dir=tmp_path, resume=True, on_iteration=lambda *_: pytest.fail("trains"))
        assert_same_state(expected, student.state_dict())
        assert again.metrics == first.metrics

    def test_another_run_is_not_overwritten(self, tmp_path):
        student, teacher = pair()
        zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        student, teacher = pair()
        with pytest.raises(FileExistsError, match="holds a run;"):
            zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path)
        with pytest.raises(ValueError, match="student_lr was 0.01, is 0.02"):
            zero_shot_qat(student, teacher, changed(student_lr=0.02), run_dir=tmp_path, resume=True)
        other = gq.quantize(teacher, 4, 3)
        bits = r"another student \(bits were weights 3, activations 3, are weights 4, activations 3\)"
        with pytest.raises(ValueError, match=bits):
            zero_shot_qat(other, teacher, CONFIG, run_dir=tmp_path, resume=True)
        with torch.no_grad():
            next(teacher.parameters())[0] += 1
        with pytest.raises(ValueError, match="another teacher"):
            zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path, resume=True)
        assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("x")
        student, teacher = pair()
        with pytest.raises(FileExistsError, match="not empty and holds no run"):
            zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path)
        with pytest.raises(NotADirectoryError, match="is a file"):
            zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path / "thesis.tex")

    def test_a_damaged_checkpoint(self, tmp_path):
        student, teacher = pair()
        zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path)
        data = (tmp_path / "checkpoint.pt").read_bytes()
        (tmp_path / "checkpoint.pt").write_bytes(data[:len(data) // 2])
        student, teacher = pair()
        with pytest.raises(ValueError, match=r"checkpoint .* is damaged"):
            zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path, resume=True)

    def test_a_checkpoint_of_something_else_leaves_the_teacher(self, tmp_path):
        student, teacher = pair()
        zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        torch.save(state | dict(iteration=10**6), tmp_path / "checkpoint.pt")
        student, teacher = pair()
        before = [dict(vars(m)) for m in teacher.modules()]
        with pytest.raises(ValueError, match=r"checkpoint .* is damaged.*iteration 1000000"):
            zero_shot_qat(student, teacher, CONFIG, run_dir=tmp_path, resume=True)
        assert [dict(vars(m)) for m in teacher.modules()] == before


def test_divergence_is_reported_and_not_saved(tmp_path):
    student, teacher = pair()
    with pytest.raises(FloatingPointError, match=r"diverged in epoch 2: loss_\w+ is .*; lower student_lr=1e\+20"):
        zero_shot_qat(student, teacher, changed(student_lr=1e20, checkpoint_every=4), run_dir=tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 4  # of the warm-up


@pytest.mark.parametrize("change, message", [
    (dict(num_classes=100), "num_classes is 100, but the teacher's output for 2 images is [2, 10]"),
    (dict(image_channels=1), "the teacher cannot run on images of 1x8x8"),
])
def test_settings_that_do_not_fit_the_teacher(change, message):
    student, teacher = pair()
    with pytest.raises(ValueError) as error:
        zero_shot_qat(student, teacher, changed(**change))
    assert message in str(error.value)


def test_images_too_small_for_the_teacher():
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 4, 9), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(ValueError, match="cannot run on images of 3x8x8"):
        zero_shot_qat(gq.quantize(teacher, 3, 3), teacher, CONFIG)
    assert teacher.training


def test_teachers_and_students_that_cannot_be_trained():
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        zero_shot_qat(gq.quantize(without, 3, 3), without, CONFIG)
    student, teacher = pair()
    for swapped, which in (((teacher, student), "the second has"), ((teacher, teacher), "the first has no")):
        with pytest.raises(ValueError, match=f"the first network is the quantized student, .* here {which} Brevitas quantizers"):
            zero_shot_qat(*swapped, CONFIG)
    sharing, _ = pair()
    sharing[-1].weight = teacher[-1].weight
    with pytest.raises(ValueError, match="share parameters"):
        zero_shot_qat(sharing, teacher, CONFIG)
    with pytest.raises(ValueError, match="no parameter to train"):
        zero_shot_qat(student.requires_grad_(False), teacher, CONFIG)
    with pytest.raises(TypeError, match="config must be a ZeroShotConfig, got dict"):
        zero_shot_qat(student, teacher, {})
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"images must be float \[N, 3, 8, 8\], got torch.uint8"):
        zero_shot_qat(student, teacher, CONFIG, images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        zero_shot_qat(student, teacher, CONFIG, images=np.zeros((4, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="evaluate_every must be at least 1, got 0"):
        zero_shot_qat(student, teacher, CONFIG, evaluate=lambda m: 0, evaluate_every=0)
    with pytest.raises(ValueError, match="must have one dtype; theirs are torch.float32 and torch.float64"):
        zero_shot_qat(student, copy.deepcopy(teacher).double(), CONFIG)
    with pytest.raises(ValueError, match="needs a GPU"):
        zero_shot_qat(student, teacher, changed(compile="cudagraphs"))


@pytest.mark.parametrize("act_quant", [
    gq.GranQActPerChannel, gq.GranQActPerChannelStatic, gq.GranQActPerChannelStatic.let(learned_scale=True)])
@pytest.mark.parametrize("stop_at", [2, 5, 8, 11])
def test_a_stopped_run_resumes_bit_identically(tmp_path, act_quant, stop_at):
    """In the warm-up, while ranges move, and after they froze; from a checkpoint in the middle of an epoch."""
    class Stop(Exception):
        pass

    def stop(done, log):
        if done == stop_at:
            raise Stop
    config = changed(checkpoint_every=2, range_epochs=1, **AUGMENTED)
    student, teacher = pair(act_quant)
    expected = zero_shot_qat(student, teacher, config)
    with pytest.raises(Stop):
        zero_shot_qat(*pair(act_quant), config, run_dir=tmp_path, on_iteration=stop)
    resumed, _ = pair(act_quant)
    result = zero_shot_qat(resumed, teacher, config, run_dir=tmp_path, resume=True)
    assert_same_state(student.state_dict(), resumed.state_dict())
    assert_same_state(expected.generator.state_dict(), result.generator.state_dict())
    assert torch.equal(expected.images, result.images)


def command(tmp_path, *more) -> list[str]:
    return [sys.executable, "-W", "ignore", str(Path(__file__).with_name("small_run.py")), str(tmp_path), *more]


def environment() -> dict:
    return os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")


@pytest.mark.parametrize("act", ["dynamic", "static"])
def test_a_killed_run_resumes_bit_identically(tmp_path, act):
    """SIGKILL at a random moment, twice; then the result equals that of a run in one go."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, act), env=environment(), check=True, capture_output=True)
    for _ in range(2):
        process = subprocess.Popen(command(killed, act), env=environment(), stdout=subprocess.PIPE, text=True)
        stop_after = random.randrange(5, 20)  # of 60, twice
        for _, line in zip(range(stop_after), process.stdout):
            assert line.startswith("iteration")
        time.sleep(random.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not (killed / "result.pt").exists()
    subprocess.run(command(killed, act), env=environment(), check=True, capture_output=True)
    expected, got = (torch.load(folder / "result.pt", weights_only=True) for folder in (whole, killed))
    for part in ("student", "generator"):
        assert_same_state(expected[part], got[part])
    assert torch.equal(expected["images"], got["images"])
    strip = ("images_per_second", )
    assert [{k: v for k, v in r.items() if k not in strip} for r in expected["metrics"]] == [
        {k: v for k, v in r.items() if k not in strip} for r in got["metrics"]]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The process may not write files beyond a size that a checkpoint exceeds later in the run (its memory grows)."""
    done = subprocess.run(command(tmp_path, "dynamic", "--file-limit"), env=environment(), capture_output=True, text=True)
    assert "cannot write" in done.stderr and "checkpoint.pt" in done.stderr, done.stderr[-500:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "config.toml", "metrics.csv", "run.json"]
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["iteration"] < 60
    subprocess.run(command(tmp_path, "dynamic"), env=environment(), check=True, capture_output=True)
    assert torch.load(tmp_path / "result.pt", weights_only=True)["metrics"][-1]["iterations"] == 60
