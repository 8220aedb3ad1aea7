"""Whatever a file holds, granq reads it or says in one line what is wrong; thousands more: python -m benchmarks.robustness."""

import os
import time

import pytest

from benchmarks import hostile

MOST_MEMORY = 300e6


@pytest.fixture(scope="module")
def prey(tmp_path_factory):
    """A folder of valid files, and a process that runs commands in it."""
    folder, here = tmp_path_factory.mktemp("hostile") / "files", os.getcwd()
    try:
        formats = {f.name: f for f in hostile.formats(folder, runs=False)}
    finally:
        os.chdir(here)
    process = hostile.Prey(folder)
    yield process, formats
    process.close()


@pytest.mark.parametrize("name", [
    "weights, safetensors", "weights, torch", "weights, torch before 1.6", "packed weights of the zoo", "card", "card of the zoo",
    "settings of qat", "settings of train-teacher", "test images, npz", "image files", "CIFAR's pickles", "demo.json"])
def test_mutated_files_are_read_or_refused(prey, name):
    process, formats = prey
    of, outcomes = formats[name], []
    hostile.place(of, process.folder, of.data)
    if of.is_read:
        assert hostile.judge(process.run(of.command), of) == "read"
    for mutation, data in hostile.tries(of, 12, seed=1, bombs=False):
        hostile.place(of, process.folder, data)
        outcome = process.run(of.command)
        outcomes.append(hostile.judge(outcome, of))
        assert outcomes[-1] in ("error", "read"), (mutation, outcome.error[-2000:])
        assert outcome.memory < MOST_MEMORY, mutation
    hostile.place(of, process.folder, of.data)
    assert "error" in outcomes


def test_the_judge_is_no_rubber_stamp():
    of = hostile.Format("x", "toml", "x", ())
    said = "granq: error: bad\n"
    for outcome, found in (
            ((0, ""), "read"), ((2, said), "error"), ((2, f"50%|##|\n{said}"), "error"), ((2, ""), "exit code 2 without"),
            ((1, said), "exit code 1"), ((2, said * 2), "exit code 2 without"), ((None, "hang"), "hang"),
            ((2, f"Traceback (most recent call last):\n{said}"), "traceback")):
        assert hostile.judge(hostile.Outcome(*outcome), of).startswith(found)
    assert hostile.judge(hostile.Outcome(0, "", executed=True), of) == "executed"
    assert hostile.judge(hostile.Outcome(2, said, escaped=True), of) == "traceback"


def test_a_hanging_and_a_dying_command_are_noticed(tmp_path):
    process = hostile.Prey(tmp_path, seconds=0.2)
    process._serve = lambda folder, pipe: os._exit(3)
    assert process.run(()).error == "died of exit code 3"
    for endless in ("import time; time.sleep(600)", "while True: pass"):
        process._serve = lambda folder, pipe, endless=endless: pipe.recv() or exec(endless)
        start = time.monotonic()
        assert process.run(()).error == "hang"
        assert time.monotonic() - start < 100
