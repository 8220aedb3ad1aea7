"""Settings: bad values are named, TOML brings back what it wrote."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granq_plugin.zero_shot import PRESETS, ZeroShotConfig, preset


@pytest.mark.parametrize("settings, message", [
    (dict(batch_size=0), "batch_size must be at least 1, got 0"),
    (dict(batch_size=2.0), "batch_size must be a whole number, got 2.0"),
    (dict(batch_size=True), "batch_size must be a whole number, got True"),
    (dict(student_lr=0), "student_lr must be above 0, got 0"),
    (dict(student_lr="fast"), "student_lr must be a number, got 'fast'"),
    (dict(student_lr=math.nan), "student_lr must be finite, got nan"),
    (dict(temperature=math.inf), "temperature must be finite, got inf"),
    (dict(momentum=1.0), "momentum must be at most 0.999, got 1.0"),
    (dict(bf16=1), "bf16 must be true or false, got 1"),
    (dict(lr_schedule="linear"), "lr_schedule must be one of step, cosine, got 'linear'"),
    (dict(betas=(0.5, )), "betas must be a list of 2 numbers, got (0.5,)"),
    (dict(lr_milestones=(100, 0)), "lr_milestones must be at least 1, got 0"),
    (dict(lr_milestones=100), "lr_milestones must be a list of any number of numbers, got 100"),
    (dict(image_size=30), "image_size must be a multiple of 4, got 30"),
    (dict(image_size=4), "image_size must be at least 8, got 4"),
    (dict(num_classes=1), "num_classes must be at least 2, got 1"),
    (dict(accumulation_steps=3), "accumulation_steps must divide batch_size=16, got 3"),
    (dict(lambda_lower=0.9), "lambda_lower must not exceed lambda_upper=0.8, got 0.9"),
    (dict(epochs=4), "warmup_epochs must be less than epochs=4, got 4"),
    (dict(replay_steps=1), "replay_steps needs a memory_size of at least batch_size=16, got 0"),
])
def test_bad_values_are_named(settings, message):
    with pytest.raises((ValueError, TypeError)) as error:
        ZeroShotConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("batchsize = 3", "unknown setting 'batchsize'; did you mean: batch_size"),
    ("xyz = 3", "unknown setting 'xyz'; allowed: num_classes, "),
    ("batch_size = [", "not a TOML file"),
    ("batch_size = '8'", "batch_size must be a whole number"),
    ("[student]\nlr = 1", "unknown setting 'student'"),
])
def test_bad_toml_is_explained(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError)) as error:
        ZeroShotConfig.from_file(path)
    assert message in str(error.value) and "c.toml" in str(error.value)


def test_unknown_preset_and_setting():
    with pytest.raises(ValueError, match="unknown preset 'cifar'; known: cifar10, "):
        preset("cifar")
    with pytest.raises(ValueError, match="unknown setting 'lr'"):
        preset("cifar10", lr=1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_toml(name):
    assert ZeroShotConfig.from_toml(PRESETS[name].to_toml()) == PRESETS[name]


@given(st.fixed_dictionaries(dict(
    student_lr=st.floats(1e-300, 1e300), temperature=st.floats(1e-9, 1e9), seed=st.integers(0, 2**62), bf16=st.booleans(),
    lr_milestones=st.lists(st.integers(1, 10**6)), betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))))
def test_any_settings_survive_toml(settings):
    config = ZeroShotConfig(**settings)
    assert ZeroShotConfig.from_toml(config.to_toml()) == config


def test_toml_changes_what_it_names_only():
    base = preset("cifar100")
    config = ZeroShotConfig.from_toml("seed = 3\nlr_milestones = [1, 2]", base=base)
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(base, f.name)}
    assert changed == {"seed", "lr_milestones"} and config.lr_milestones == (1, 2)


def test_published_settings():
    """The table of the paper's settings."""
    rows = {name: (c.batch_size, c.epochs, c.iterations, c.student_lr, c.lr_milestones, c.warmup_epochs, c.lambda_lower,
                   c.temperature, c.num_classes) for name, c in PRESETS.items()}
    assert rows["cifar10"] == (16, 200, 200, 1e-4, (100, 200, 300), 4, 0.1, 20, 10)
    assert rows["cifar100"] == (200, 200, 200, 1e-4, (100, 200, 300), 4, 0.1, 20, 100)
    assert rows["imagenet_resnet18"] == (16, 400, 200, 1e-5, (350, 400), 50, 0.1, 5, 1000)
    assert rows["imagenet_mobilenet_v2"] == (16, 400, 200, 1e-5, (350, 400), 4, 0.1, 5, 1000)
    assert rows["imagenet_resnet50"] == (16, 400, 200, 1e-4, (150, 300, 400), 50, 0.4, 5, 1000)


def test_learning_rate_schedules():
    step = ZeroShotConfig(epochs=4, iterations=10, warmup_epochs=1, lr_milestones=(2, 3))
    assert [step.lr_factor(i) for i in (0, 19, 20, 29, 30, 39)] == pytest.approx([1, 1, .1, .1, .01, .01])
    cosine = ZeroShotConfig(epochs=4, iterations=10, warmup_epochs=1, lr_schedule="cosine")
    factors = [cosine.lr_factor(i) for i in range(40)]
    assert factors[0] == 1 and factors[20] == pytest.approx(0.5) and 0 < factors[-1] < 0.01
    assert factors == sorted(factors, reverse=True)
