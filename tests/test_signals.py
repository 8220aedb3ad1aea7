"""Signals end a command in one line, and a second process is told that the folder is taken."""

import os
import re
import signal
import subprocess
import sys
import time

import click
import pytest
import torch.distributed as dist

from granq_plugin.cli.options import MOST_WORDS, input_errors
from granq_plugin.reading import load_torch

# longer than the second process takes to start, on any machine: all runs are ended by signals
LONG = ("epochs=1000", "iterations=10", "warmup_epochs=1", "batch_size=8", "memory_size=0", "replay_steps=0", "checkpoint_every=1")


def granq_qat(folder, *more) -> subprocess.Popen:
    arguments = ["qat", "resnet8_digits", "--out", str(folder), *(f"--set={s}" for s in LONG), *more]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "granq_plugin", *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_run_ends_on_signals_and_is_alone_in_its_folder(tmp_path):
    folder, done = tmp_path / "run", 0
    for number, code, word in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
        process = granq_qat(folder, "--resume")
        second = granq_qat(folder, "--resume") if number == signal.SIGTERM else None
        checkpoint, before = folder / "checkpoint.pt", done
        while process.poll() is None and (not checkpoint.is_file() or load_torch(checkpoint)["iteration"] <= before):
            time.sleep(0.05)
        if second:
            while process.poll() is None and second.poll() is None:
                time.sleep(0.05)
            first_lost = process.poll() is not None  # either may have been the first to come
            process, second = (second, process) if first_lost else (process, second)
            _, said = second.communicate()
            assert second.returncode == 2 and "in use by another process" in said.splitlines()[-1]
            while process.poll() is None and not checkpoint.is_file():
                time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == code and "Traceback" not in said
        hint = "the same command with --resume goes on from the last checkpoint, if there is one"
        assert said.splitlines()[-1] == f"granq: {word}; {hint}"
        assert not [p for p in folder.iterdir() if re.search(r"\.part\d+$", p.name)]
        done = load_torch(checkpoint)["iteration"]
        assert before < done < 2000


@pytest.mark.parametrize("error, said", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried ..."), "not enough memory: .*can't allocate memory: you"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory: CUDA out of memory"),
    (MemoryError(), "not enough memory"), (ValueError("a\n  b"), "a b$"),
    (ValueError("x" * 10**6), f"^x{{{MOST_WORDS // 2}}} ... x")])
def test_errors_are_one_line_of_bounded_length(error, said):
    with pytest.raises(click.ClickException, match=said) as caught, input_errors():
        raise error
    assert "\n" not in caught.value.message and len(caught.value.message) < MOST_WORDS + 20


def test_a_lost_rank_is_told_and_other_failures_are_not_hidden(monkeypatch):
    error = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="^Connection closed"), input_errors():
        raise error
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(click.ClickException, match="rank 1 stops, another one failed or died: Connection closed"), input_errors():
        raise error
