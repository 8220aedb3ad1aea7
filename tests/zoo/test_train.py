"""Teachers: augmentation against loops, the schedule, resuming bit by bit, and that a network learns."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zoo.card import Preprocessing
from zoo.data import ImageSet
from zoo.train import TrainConfig, train_preset, train_teacher

PREPROCESSING = Preprocessing(8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CONFIG = TrainConfig(epochs=4, batch_size=16, start_size=4, bf16=False)


def striped(count=100):
    """Images of two classes: stripes along the rows or along the columns, which mirroring and cropping keep."""
    labels = torch.arange(count) % 2
    stripes = 200 * (torch.arange(8) % 4 < 2).to(torch.uint8)
    images = torch.where(labels[:, None, None].bool(), stripes[None, None, :], stripes[None, :, None])
    return ImageSet(images[:, None].expand(-1, 3, -1, -1).contiguous(), labels, "memory")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2))


def test_learning_rate_rises_and_falls_without_a_step():
    factors = np.array([TrainConfig(lr_warmup=0.25).lr_factor(t) for t in np.linspace(0, 1, 401)])
    assert factors[0] == 0 and factors[-1] < 1e-12 and factors[100] == 1 == factors.max()
    assert np.abs(np.diff(factors)).max() < 0.011
    assert TrainConfig(lr_warmup=0.0).lr_factor(0) == 1


@given(st.integers(1, 50), st.integers(0, 10), st.integers(1, 10), st.floats(0, 1))
def test_image_size_grows_to_the_networks(epochs, start, full, until):
    start, full = 4 * min(start, full), 4 * full
    config = TrainConfig(epochs=epochs, start_size=start, grow_until=until)
    sizes = [config.size_in(e, full) for e in range(epochs)]
    assert sizes == sorted(sizes) and all(s % 4 == 0 for s in sizes)
    assert all(s == full for e, s in enumerate(sizes) if e >= until * epochs or not start)
    if start and until > 0:
        assert sizes[0] == start


def test_a_network_learns():
    metrics = train_teacher(net := network(), striped(), PREPROCESSING, CONFIG.replace(epochs=12, lr=0.3), evaluate=lambda m: 7.0)
    assert metrics[-1]["train_accuracy"] > 95 and not net.training
    assert [row["image_size"] for row in metrics][::11] == [4, 8]
    assert [row.get("accuracy") for row in metrics] == [None] * 11 + [7.0]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_cut_short_goes_on_bit_by_bit(tmp_path, bf16):
    config = CONFIG.replace(bf16=bf16)
    train_teacher(whole := network(), striped(), PREPROCESSING, config, run_dir=tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(done, _):
        if done == 15:  # in the third epoch, of 6 steps each
            raise Cut
    with pytest.raises(Cut):
        train_teacher(network(), striped(), PREPROCESSING, config, run_dir=tmp_path / "cut", on_step=cut)
    train_teacher(resumed := network(), striped(), PREPROCESSING, config, run_dir=tmp_path / "cut", resume=True)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)
    assert not [p.name for p in (tmp_path / "cut").iterdir() if "part" in p.name]
    with pytest.raises(ValueError, match="another network"):
        torch.manual_seed(1)
        other = network()
        nn.init.ones_(other[0].weight)
        train_teacher(other, striped(), PREPROCESSING, config, run_dir=tmp_path / "cut", resume=True)
    with pytest.raises(ValueError, match=r"lr was 0\.15, is 0\.3"):
        train_teacher(network(), striped(), PREPROCESSING, config.replace(lr=0.3), run_dir=tmp_path / "cut", resume=True)


def test_bad_input():
    with pytest.raises(ValueError, match="images are 8x8, the network takes 16x16"):
        train_teacher(network(), striped(), Preprocessing(16, (0.5, ) * 3, (0.5, ) * 3), CONFIG)
    with pytest.raises(ValueError, match="batch_size=128 exceeds the 100 training images of 'memory'"):
        train_teacher(network(), striped(), PREPROCESSING, TrainConfig())
    with pytest.raises(ValueError, match="unknown setting 'momentun'; did you mean: momentum"):
        train_preset("cifar10", momentun=0.5)
    with pytest.raises(FloatingPointError, match="training diverged in epoch 1"):
        train_teacher(network(), striped(), Preprocessing(8, (0.5, ) * 3, (1e-30, ) * 3), CONFIG.replace(lr=1e30))
    assert train_preset("other") == TrainConfig()


def test_held_out_images_are_the_others():
    numbered = ImageSet(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 8, 8), torch.arange(20), "memory")
    rest, held = numbered.split(6, seed=3)
    assert sorted(rest.labels.tolist() + held.labels.tolist()) == list(range(20)) and len(held) == 6
    assert torch.equal(held.labels, numbered.subset(6, seed=3).labels)
    with pytest.raises(ValueError, match="cannot hold out 20 of the 20"):
        numbered.split(20)
