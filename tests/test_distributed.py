"""Static ranges and training under torch.distributed: two gloo processes on this machine."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import oracles
import ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without torch.distributed and gloo")


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> list[dict]:
    return ranks.run_ranks(tmp_path_factory.mktemp("ranks"), ranks.everything)


@pytest.fixture(scope="module")
def single() -> dict:
    return ranks.everything(None)


@pytest.mark.parametrize("name", [
    "minmax", "ema", "average", "signed", "calibration", ("empty", "first"), ("empty", "second")], ids=str)
def test_ranges_are_those_of_the_whole_batch(distributed, single, name):
    """On both ranks, equal to one process that sees the concatenated batches; also where a rank has an empty one."""
    for rank, state in enumerate(distributed):
        for key, value in single["ranges"][name].items():
            oracles.assert_equal(state["ranges"][name][key], ranks.share(value, rank) if key == "y" else value)


def test_ranges_drift_apart_without_synchronization(distributed):
    """So the test above does not pass for free."""
    first, second = (state["ranges"]["not_synchronized"]["hi"] for state in distributed)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("training", ranks.TRAININGS, ids=str)
def test_ddp_trains_as_one_process_does(distributed, single, training):
    """Weights and ranges stay equal on both ranks; gradients averaged over the ranks are the whole batch's."""
    first, second = (state[training] for state in distributed)
    for name, value in single[training].items():
        oracles.assert_equal(first[name], second[name])
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", ranks.TRAININGS, ids=str)
def test_ddp_changes_every_weight(distributed, training):
    torch.manual_seed(0)
    start = dict(oracles.QuantNet(ranks.GranQActPerChannel, ranks.GranQWeightPerChannel).named_parameters())
    for name, value in start.items():
        assert not torch.equal(distributed[0][training][name], value), name


@pytest.mark.parametrize("run", ranks.ZERO_SHOT, ids=str)
def test_zero_shot_qat_on_two_ranks_is_that_on_one(distributed, single, run):
    """Student, generator, memory and metrics, with the same global batch, up to the order of summation. The generator's micro-batch
    is the shard of every rank together, so its batch statistics are the same too."""
    first, second = (state["zero_shot"][run] for state in distributed)
    for name, value in single["zero_shot"][run].items():
        oracles.assert_equal(first[name], second[name])
        tolerance = dict(rtol=1e-3, atol=1e-3) if name == "images" else dict(rtol=1e-8, atol=1e-9)  # images: float16
        torch.testing.assert_close(first[name], value, **tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_a_generator_is_sampled_on_one_rank_alone(distributed, single):
    """Its batch statistics are that rank's: the others may have gone."""
    assert torch.equal(distributed[0]["sample"], single["sample"]) and distributed[1]["sample"] is None


def test_granq_qat_on_two_ranks_leaves_a_whole_run(tmp_path):
    """As torchrun starts it. The first rank writes what the run leaves, when the other has ended."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    few = ("epochs=1", "iterations=2", "warmup_epochs=0", "batch_size=8", "memory_size=16", "replay_steps=1")
    processes = [subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "granq_plugin", "qat", "resnet8_digits", "--out", str(tmp_path / "run"),
         "--threads=1", *(f"--set={s}" for s in few)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))) for rank in range(2)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "student_sha256" in json.loads((tmp_path / "run" / "run.json").read_text())
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"student.safetensors", "images.safetensors", "images.png", "metrics.csv"} < left
