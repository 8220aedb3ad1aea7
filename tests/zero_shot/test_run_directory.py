"""A run's folder: one process at a time, whole files, and a start from wherever a killed process left it."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from granq_plugin.zero_shot import ZeroShotConfig
from granq_plugin.zero_shot.run_directory import RunDirectory, add_to_run

CONFIG = ZeroShotConfig()


@pytest.fixture(scope="module")
def network():
    return nn.Linear(2, 2)


def opened(path, network, resume=True):
    return RunDirectory(path, CONFIG, dict(teacher=network), resume)


def test_one_process_at_a_time(tmp_path, network):
    with opened(tmp_path / "run", network), pytest.raises(FileExistsError, match=r"run' is in use by another process"):
        opened(tmp_path / "run", network)
    with opened(tmp_path / "run", network):  # it was let go
        pass
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.toml", "run.json"]  # and no file was needed


def test_a_killed_process_lets_go(tmp_path, network):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        directory = opened(tmp_path, network)
        os.write(writer, b"x")
        signal.pause()
        os._exit(len(vars(directory)))
    os.read(reader, 1)
    with pytest.raises(FileExistsError, match="in use by another process"):
        opened(tmp_path, network)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with opened(tmp_path, network):
        pass


def test_another_run_in_the_folder_is_let_go_too(tmp_path, network):
    with opened(tmp_path, network):
        pass
    for other in (nn.Linear(3, 3), network):
        with pytest.raises((ValueError, FileExistsError), match="another teacher|holds a run;"):
            opened(tmp_path, other, resume=other is not network)
    with opened(tmp_path, network):
        pass


@pytest.mark.parametrize("left", [["config.toml.part12"], ["config.toml"], ["config.toml", "run.json.part3"], ["tensorboard"]])
def test_a_process_that_was_killed_in_its_first_moments(tmp_path, network, left):
    for name in left:
        (tmp_path / name).write_text("half")
    if left != ["tensorboard"]:
        with pytest.raises(FileExistsError, match="holds no run"):
            opened(tmp_path, network, resume=False)
    with opened(tmp_path, network):
        assert {p.name for p in tmp_path.iterdir()} == {"config.toml", "run.json"} | ({"tensorboard"} & set(left))


def test_what_is_not_a_run_s_stays(tmp_path, network):
    for name in ("thesis.txt", "x.part1"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="holds no run"):
        opened(tmp_path, network)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt", "x.part1"}


def test_resuming_keeps_what_the_run_has_found(tmp_path, network):
    """A finished run that is resumed and killed is still finished."""
    with opened(tmp_path, network):
        add_to_run(tmp_path, dict(top1=1.5))
    with opened(tmp_path, network):
        assert json.loads((tmp_path / "run.json").read_text())["top1"] == 1.5


def test_checkpoints_are_whole_or_damaged(tmp_path, network):
    state = dict(weights=torch.arange(100.), metrics=[dict(epoch=1)])
    with opened(tmp_path, network) as directory:
        with pytest.raises(KeyError), directory.checkpoint() as found:
            assert found is None
            raise KeyError("mine")  # there is no checkpoint to blame
        directory.save_checkpoint(state)
        with directory.checkpoint() as found:
            assert torch.equal(found["weights"], state["weights"])
        with pytest.raises(ValueError, match=r"checkpoint .* is damaged \('w'\); remove it"), directory.checkpoint() as found:
            found["w"]
        file = tmp_path / "checkpoint.pt"
        data = bytearray(file.read_bytes())
        data[data.index(torch.arange(50., 52.).numpy().tobytes())] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"checkpoint .* is damaged .*checksum"), directory.checkpoint():
            pytest.fail("a wrong number was read")
        directory.save_checkpoint(state | dict(metrics=[dict(epoch="x")]))
        with pytest.raises(ValueError, match="its metrics are not numbers"), directory.checkpoint():
            pass
