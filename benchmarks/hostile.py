"""Every file that ``granq`` reads, as a valid one, and the command that reads it: what :mod:`benchmarks.robustness` mutates.

A :class:`Prey` process runs ``granq`` again and again without paying for its imports, and is measured and ended from outside.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.mutated_tensors import CANARY
from benchmarks.mutations import BOMBS, MUTATIONS

__all__ = ["FEW", "Format", "Outcome", "Prey", "formats", "judge", "tries"]

NETWORK, QUANTIZED = "resnet8_digits", "resnet8_digits.granq_w3a3"
FEW = ("epochs=2", "iterations=2", "warmup_epochs=1", "batch_size=8", "memory_size=16", "replay_steps=1", "checkpoint_every=1")
"""Settings of ``granq qat`` that end in a second."""
SMALL_CARD = """\
architecture = "zoo.models.cifar_resnet:CifarResNet"
dataset = "cifar10"
num_classes = 10

[architecture_args]
depth = 8
shortcut = "B"

[preprocessing]
image_size = 8
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
"""


@dataclass(frozen=True)
class Format:
    """A kind of file at a place where the product reads it.

    Attributes:
        name: in words. kind: of :data:`benchmarks.mutations.MUTATIONS`. path: where the file stands, in the folder of all files.
        command: the arguments of ``granq``. data: the valid file. read_codes: exit codes of a correct read.
        read_words: what the error says, where a correct read is followed by an error that ends the command early.
        spoiled: names of files that the command writes, removed before each try.
        share: of the mutations that are asked for: less where a correct read takes seconds.
        repair: makes the rest of the folder fit the mutated file (a card's SHA-256). is_read: False where the valid file, too, is
        refused, or starts minutes of work, and is not tried.
    """
    name: str
    kind: str
    path: str
    command: tuple[str, ...]
    data: bytes = b""
    read_codes: tuple[int, ...] = (0, )
    read_words: str = ""
    spoiled: tuple[str, ...] = ()
    share: float = 1.0
    repair: Callable[[Path, bytes], None] | None = None
    is_read: bool = True


@dataclass(frozen=True)
class Outcome:
    """Of one command. Attributes: code: the exit code, or None if there is none; error: all of stderr, or what happened; escaped:
    whether an exception left the command; memory: growth of the peak in bytes; executed: whether a payload ran."""
    code: int | None
    error: str
    escaped: bool = False
    memory: int = 0
    executed: bool = False


def judge(outcome: Outcome, of: Format) -> str:
    """``read``, ``error``, or what it must not be."""
    if outcome.executed:
        return "executed"
    if outcome.code is None:
        return outcome.error
    if outcome.escaped or "Traceback" in outcome.error:
        return "traceback"
    if outcome.code in of.read_codes:
        return "read"
    said = [line for line in outcome.error.splitlines() if line.startswith("granq: error: ")]
    if outcome.code == 2 and len(said) == 1 and outcome.error.rstrip().splitlines()[-1] == said[0]:
        return "read" if of.read_words and of.read_words in said[0] else "error"
    return f"exit code {outcome.code} without a line of error"


class Prey:
    """A forked process that runs commands in ``folder``; a new one takes its place when it dies or hangs.

    A command hangs that has computed for so many seconds, or not ended in twenty times as many: beside other work a process waits.
    """

    def __init__(self, folder: Path, seconds: float = 30) -> None:
        self.folder, self.seconds, self._process, self._serve = folder, seconds, None, _serve

    def run(self, args: tuple[str, ...]) -> Outcome:
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("fork")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=self._serve, args=(self.folder, theirs), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send(args)
            start, limit = time.monotonic(), _cpu_seconds(self._process.pid) + self.seconds
            while time.monotonic() < start + 20 * self.seconds and _cpu_seconds(self._process.pid) < limit:
                if self._pipe.poll(1):
                    return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return Outcome(None, f"died of exit code {self._process.exitcode}")
        self.close()
        return Outcome(None, "hang")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _cpu_seconds(pid: int) -> float:
    """That a process has computed, in all its threads; of one that has gone, none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(folder: Path, pipe) -> None:
    import torch
    torch.set_num_threads(1)
    os.chdir(folder)
    canary = folder / "canary"
    os.environ[CANARY] = str(canary)
    os.environ.pop("GRANQ_DATA", None)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)  # C libraries write there
        os.dup2(nothing.fileno(), 2)
    while True:
        args = pipe.recv()
        outcome = _run(args)
        if canary.exists():
            canary.unlink()
            outcome = Outcome(outcome.code, outcome.error, outcome.escaped, outcome.memory, True)
        pipe.send(outcome)


def _run(args: tuple[str, ...]) -> Outcome:
    from granq_plugin.cli import run
    out, err, code, escaped = io.StringIO(), io.StringIO(), None, False
    sys.argv = ["granq", *args]
    before = _memory(reset=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = run(list(args))
        except BaseException:
            traceback.print_exc()
            escaped, code = True, 1
    return Outcome(code, err.getvalue(), escaped, _memory() - before)


def _memory(reset: bool = False) -> int:
    """Peak resident bytes since the last reset (which makes the peak the present use)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def tries(of: Format, count: int, seed: int, bombs: bool = True) -> Iterator[tuple[str, bytes]]:
    """``count`` mutated files ``(name of the mutation, bytes)`` of a format, and the bomb of its kind."""
    rng = random.Random(f"{seed} {of.name}")
    for _ in range(count):
        mutation = rng.choice(MUTATIONS[of.kind])
        yield mutation.__name__, mutation(of.data, rng)
    if bombs and of.kind in BOMBS:
        yield BOMBS[of.kind].__name__, BOMBS[of.kind](of.data, rng)


def place(of: Format, folder: Path, data: bytes) -> None:
    """Put a file where the command reads it, and remove what the last command wrote."""
    for name in of.spoiled:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / of.path).write_bytes(data)
    if of.repair:
        of.repair(folder, data)


def formats(folder: Path, runs: bool = True) -> list[Format]:
    """Make a folder of valid files, change into it, and say what reads each of them.

    Args:
        runs: also those of runs, which are made first: some seconds.
    """
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save

    import zoo
    from granq_plugin.cli import run
    from zoo.registry import teacher_of

    few = tuple(f"--set={s}" for s in FEW)
    small_train = ("--set=epochs=2", "--set=batch_size=512")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    torch.manual_seed(0)
    state = teacher_of(zoo.get_card(NETWORK))[0].state_dict()
    (folder / "w.safetensors").write_bytes(save({k: v.contiguous() for k, v in state.items()}))
    torch.save(state, folder / "w.pt")
    torch.save(dict(state_dict=state), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "small.toml").write_text(SMALL_CARD)
    torch.save(zoo.get_card("small.toml").build().state_dict(), folder / "small.pt")
    rng = np.random.default_rng(0)
    for name in ("data/cifar10", "images/cifar10/test/0", "images/cifar10/test/1", "torchvision/cifar-10-batches-py", "zoo/cards",
                 "zoo/pretrained"):
        (folder / name).mkdir(parents=True)
    arrays = dict(x=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), y=rng.integers(0, 10, 40))
    np.savez(folder / "data/cifar10/test.npz", **arrays)
    np.savez(folder / "calibration.npz", **arrays)
    for i, suffix in enumerate(("png", "jpg", "png", "bmp")):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"images/cifar10/test/{i % 2}/{i}.{suffix}")
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / "torchvision/cifar-10-batches-py" / name).write_bytes(b"\x80\x02}.")
    package = Path(zoo.__file__).parent
    for name in (NETWORK, QUANTIZED):
        shutil.copy(package / "cards" / f"{name}.toml", folder / "zoo/cards")
        shutil.copy(package / "pretrained" / f"{name}.safetensors", folder / "zoo/pretrained")
    shutil.copy(package / "configs" / f"{QUANTIZED}.toml", folder / "qat.toml")
    shutil.copy(package / "configs" / f"{NETWORK}.toml", folder / "train.toml")
    (folder / "demo").mkdir()
    (folder / "demo/demo.json").write_text('{\n  "bits": "W3A3",\n  "network": "x",\n  "version": "0"\n}\n')
    for made in () if not runs else (
            ("qat", NETWORK, "--out", "run", *few),
            ("qat", NETWORK, "--out", "folded", "--activations", "folded", "--images", "run/images.safetensors",
             *few[:2], few[3], "--set=memory_size=0", "--set=replay_steps=0", "--set=warmup_epochs=0"),
            ("qat", "small.toml", "--weights", "small.pt", "--preset", "cifar10_fast", "--out", "own", "--set=image_size=8", *few),
            ("train-teacher", NETWORK, "--out", "teacher", *small_train),
            ("export", "folded", "--format", "qonnx", "--out", "model.onnx"),
            ("export", "folded", "--format", "qcdq", "--out", "qcdq.onnx")):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            if run(list(made)):
                raise RuntimeError(f"granq {' '.join(made)}: {err.getvalue()}")

    def same_hash(name: str) -> Callable[[Path, bytes], None]:
        """The attacker writes the card, too."""
        def repair(folder: Path, data: bytes) -> None:
            path = folder / f"zoo/cards/{name}.toml"
            text = re.sub(r"(?m)^(\[weights\]\nsha256 = ).*$", rf'\1"{hashlib.sha256(data).hexdigest()}"', path.read_text())
            path.write_text(text)
        return repair

    def same_student(run: str) -> Callable[[Path, bytes], None]:
        def repair(folder: Path, data: bytes) -> None:
            path = folder / run / "run.json"
            text = re.sub(r'("student_sha256": ).*', rf'\1"{hashlib.sha256(data).hexdigest()}"', path.read_text())
            path.write_text(text)
        return repair

    weights, out = ("--weights", "small.pt"), ("--format", "qonnx", "--out", "out.onnx")
    small = ("evaluate", "small.toml", *weights, "--data")
    resume = ("qat", NETWORK, "--out", "run", "--resume", *few)
    publish = ("zoo", "add", "--zoo", "new_zoo")
    train = ("train-teacher", NETWORK, "--out", "teacher", "--resume", *small_train)
    meta = dict(read_words="device 'meta' is not available")  # settings are read, no training follows
    listed = [
        Format("weights, safetensors", "safetensors", "w.safetensors", ("evaluate", NETWORK, "--weights", "w.safetensors")),
        Format("weights, torch", "torch", "w.pt", ("evaluate", NETWORK, "--weights", "w.pt")),
        Format("weights, torch before 1.6", "torch legacy", "legacy.pt", ("evaluate", NETWORK, "--weights", "legacy.pt")),
        Format("packed weights of the zoo", "packed", f"zoo/pretrained/{QUANTIZED}.safetensors",
               ("zoo", "evaluate", QUANTIZED, "--zoo", "zoo"), read_codes=(0, 1), repair=same_hash(QUANTIZED)),
        Format("float weights of the zoo", "safetensors", f"zoo/pretrained/{NETWORK}.safetensors",
               ("zoo", "evaluate", NETWORK, "--zoo", "zoo"), read_codes=(0, 1), repair=same_hash(NETWORK)),
        Format("card", "toml", "small.toml", (*small, "data")),
        Format("card of the zoo", "toml", f"zoo/cards/{QUANTIZED}.toml", ("zoo", "evaluate", QUANTIZED, "--zoo", "zoo"),
               read_codes=(0, 1)),
        Format("settings of qat", "toml", "qat.toml", ("qat", NETWORK, "--out", "new", "--config", "qat.toml", "--device", "meta"),
               **meta),
        Format("settings of train-teacher", "toml", "train.toml",
               ("train-teacher", NETWORK, "--out", "new", "--config", "train.toml", "--device", "meta"), **meta),
        Format("checkpoint of qat", "torch", "run/checkpoint.pt", resume, share=0.5),
        Format("checkpoint of train-teacher", "torch", "teacher/checkpoint.pt", train),
        Format("config.toml of a run", "toml", "run/config.toml", resume, share=0.5),
        Format("run.json, resumed", "json", "run/run.json", resume, share=0.3),
        Format("run.json, exported", "json", "folded/run.json", ("export", "folded", *out), spoiled=("out.onnx", ), share=0.3),
        Format("card.toml of a run", "toml", "own/card.toml", ("export", "own", *out), spoiled=("out.onnx", )),
        Format("student.safetensors", "safetensors", "own/student.safetensors", ("export", "own", *out), spoiled=("out.onnx", ),
               repair=same_student("own"), share=0.3),
        Format("calibrated.safetensors", "safetensors", "folded/calibrated.safetensors", ("export", "folded", *out),
               spoiled=("out.onnx", ), share=0.2),
        Format("metrics.csv, published", "csv", "run/metrics.csv", (*publish, "run"), spoiled=("new_zoo", ),
               share=0.3),
        Format("config.toml, published", "toml", "run/config.toml", (*publish, "run"), spoiled=("new_zoo", ),
               share=0.3),
        Format("run.json of a teacher", "json", "teacher/run.json", (*publish, "teacher"),
               spoiled=("new_zoo", ), share=0.3),
        Format("images.safetensors", "safetensors", "run/images.safetensors",
               ("qat", NETWORK, "--out", "new", "--images", "run/images.safetensors", *few[:2], few[3], "--set=memory_size=0",
                "--set=replay_steps=0", "--set=warmup_epochs=0"), spoiled=("new", ), share=0.3),
        Format("test images, npz", "npz", "data/cifar10/test.npz", (*small, "data")),
        Format("calibration images, npz", "npz", "calibration.npz",
               (*small, "data", "--static", "--calibration-data", "calibration.npz")),
        Format("image files", "image", "images/cifar10/test/0/0.png", (*small, "images")),
        Format("CIFAR's pickles", "pickle", "torchvision/cifar-10-batches-py/test_batch", (*small, "torchvision"), is_read=False),
        Format("ONNX, report", "onnx", "model.onnx", ("report", "model.onnx")),
        Format("ONNX, verify", "onnx", "qcdq.onnx", ("verify", "qcdq.onnx", "--model", "folded", "--count", "10"),
               read_codes=(0, 1), share=0.5),
        Format("demo.json", "json", "demo/demo.json", ("demo", "--out", "demo"), is_read=False),
    ]
    return [replace(f, data=(folder / f.path).read_bytes()) for f in listed if (folder / f.path).is_file()]
