"""Faults while ``granq`` works: signals, full and read-only disks, two runs in one folder, a rank that dies.

Commands run in forked processes that have paid for their imports; their folders are looked at afterwards, from outside.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COMMANDS", "FAULTS", "Command", "Fault", "Tried", "can_mount", "digests", "run", "run_ranks", "try_fault"]

NETWORK = "resnet8_digits"
PART = re.compile(r".+\.part\d+")


@dataclass(frozen=True)
class Command:
    """A verb. Attributes: args: of ``granq``; ``{out}`` is the folder that it writes to. resumes: whether it knows ``--resume``."""
    args: tuple[str, ...]
    resumes: bool = False

    def arguments(self, out: Path, resume: bool = False) -> list[str]:
        return [a.format(out=out) for a in self.args] + (["--resume"] if resume and self.resumes else [])


COMMANDS = {
    "qat": Command((
        "qat", NETWORK, "--out", "{out}/run", "--evaluate-every=2", "--threads=1", "--set=epochs=4", "--set=iterations=3",
        "--set=warmup_epochs=1", "--set=batch_size=8", "--set=memory_size=32", "--set=replay_steps=1",
        "--set=checkpoint_every=2"), True),
    "train-teacher": Command((
        "train-teacher", NETWORK, "--out", "{out}/run", "--threads=1", "--set=epochs=4", "--set=batch_size=256"), True),
    "evaluate": Command(("evaluate", NETWORK, "--threads=1", "--json", "{out}/result.json")),
    "export": Command(("export", "folded", "--format", "qonnx", "--out", "{out}/model.onnx")),
}
"""``export`` reads a run that :func:`benchmarks.hostile.formats` has made in the working folder."""


@dataclass(frozen=True)
class Tried:
    """What came of a fault.

    Attributes:
        code: how the command ended (negative: the signal). problems: what must not be: damaged files, left-overs, a traceback.
        lost: whether a file is damaged, or the command given again does not end well. identical: whether it then leaves what one
        leaves that nothing happened to.
    """
    code: int
    problems: tuple[str, ...]
    lost: bool
    identical: bool


def start(args: list[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """Fork a process that runs ``granq`` and writes what it says to ``log``; its id, once the command has been entered."""
    from granq_plugin.__main__ import main
    ready, entered = os.pipe()
    pid = os.fork()
    if pid:
        os.close(entered)
        os.read(ready, 1)
        os.close(ready)
        return pid
    code = 70
    try:
        os.close(ready)
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(log, "wb", buffering=0) as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        sys.argv = ["granq", *args]
        if before:
            before()
        os.close(entered)
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 71
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float = 600) -> int:
    """Its exit code, or minus the signal; a process that does not end is killed: -9."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} did not end within {seconds} s")


def run(args: list[str], log: Path, before: Callable[[], None] | None = None) -> tuple[int, str]:
    code = ended(start(args, log, before))
    return code, last_line(log)


def last_line(log: Path) -> str:
    said = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return next((line for line in reversed(said) if line.startswith("granq: ")), said[-1] if said else "")


def digests(out: Path) -> dict[str, str]:
    """What a finished command has left, without what differs from run to run: times, and where the pictures' pixels come from."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name in ("checkpoint.pt", "curves.png", "config.toml"):
            continue
        if path.suffix == ".json":
            said = json.loads(data)
            data = json.dumps({k: v for k, v in said.items() if "per_second" not in k and k != "command"}, sort_keys=True).encode()
        elif path.suffix == ".csv":
            rows = [line.split(",") for line in data.decode().splitlines()]
            data = repr([[v for k, v in zip(rows[0], row) if "per_second" not in k] for row in rows]).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def damaged(out: Path) -> list[str]:
    """Files that cannot be read as what their names say."""
    from PIL import Image
    from safetensors.torch import load_file

    from granq_plugin.export.files import read_onnx
    from granq_plugin.reading import load_torch, parse_toml, read_json, read_text
    readers = {".json": read_json, ".toml": lambda p: parse_toml(read_text(p)), ".pt": load_torch, ".safetensors": load_file,
               ".onnx": read_onnx, ".csv": lambda p: read_text(p).index("\n"), ".png": lambda p: Image.open(p).load()}
    problems = []
    for path in (p for p in out.rglob("*") if p.is_file() and not PART.fullmatch(p.name)):
        try:
            readers[path.suffix](path)
        except Exception as e:
            problems.append(f"{path.name} is damaged: {type(e).__name__}: {e}")
    return problems


class Disk:
    """A folder on a file system of its own, whose size and mode change; without the right to mount, a plain folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.mounted = os.geteuid() == 0 and self._mount("-t", "tmpfs", "-o", "size=256m", "tmpfs")

    def _mount(self, *options: str) -> bool:
        try:
            return subprocess.run(["mount", *options, str(self.folder)], capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    def remount(self, options: str) -> bool:
        """As ``mount -o remount``; a file that is open for writing holds it up for a moment."""
        return any(self._mount("-o", f"remount,{options}") or time.sleep(0.01) for _ in range(300))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


def can_mount(folder: Path) -> bool:
    disk = Disk(folder)
    disk.close()
    return disk.mounted


Fault = Callable[[Command, Path, float, random.Random], tuple[int, list[str]]]


def _by_signal(number: signal.Signals, code: int, word: str) -> Fault:
    def fault(command: Command, out: Path, seconds: float, rng: random.Random) -> tuple[int, list[str]]:
        log = out.with_suffix(".log")
        pid = start(command.arguments(out), log)
        time.sleep(0.05 + rng.random() * seconds)
        os.kill(pid, number)
        found, problems = ended(pid), []
        left = [p.name for p in out.rglob("*") if PART.fullmatch(p.name)]
        if found not in (0, code):
            problems.append(f"exit code {found}")
        if found == code != -signal.SIGKILL and not last_line(log).startswith(f"granq: {word}"):
            problems.append(f"said {last_line(log)!r}")
        if number != signal.SIGKILL and left:
            problems.append(f"left {left[0]}")
        return found, problems
    return fault


def _full_disk(command: Command, out: Path, seconds: float, rng: random.Random) -> tuple[int, list[str]]:
    """Between nothing and three quarters of what the command writes."""
    disk, log = Disk(out / "disk"), out.with_suffix(".log")
    try:
        if disk.mounted:
            disk.remount(f"size={4096 * rng.randint(1, 40)}")
            found, said = run(command.arguments(disk.folder), log)
            disk.remount("size=256m")
        else:
            found, said = run(command.arguments(disk.folder), log, lambda: _limit_files(rng.randint(1, 40) * 4096))
        problems = damaged(disk.folder) + _told(found, said, "No space left|the disk is full|File too large")
        shutil.copytree(disk.folder, out, dirs_exist_ok=True)
    finally:
        disk.close()
        shutil.rmtree(out / "disk")
    return found, problems


def _limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _read_only(command: Command, out: Path, seconds: float, rng: random.Random) -> tuple[int, list[str]]:
    """From the start, or from a random moment."""
    disk, log = Disk(out / "disk"), out.with_suffix(".log")
    if not disk.mounted:
        shutil.rmtree(out / "disk")
        raise PermissionError("cannot mount")
    try:
        delay = rng.choice((0, rng.random() * seconds))
        if not delay:
            disk.remount("ro")
        pid = start(command.arguments(disk.folder), log)
        if delay:
            time.sleep(delay)
            disk.remount("ro")
        found = ended(pid)
        disk.remount("rw")
        problems = damaged(disk.folder) + _told(found, last_line(log), "Read-only|the disk is full, or failing")
        shutil.copytree(disk.folder, out, dirs_exist_ok=True)
    finally:
        disk.close()
        shutil.rmtree(out / "disk")
    return found, problems


def _told(code: int, said: str, words: str) -> list[str]:
    """A command that failed must have said so in one line with such words."""
    if code == 0 or (code == 2 and said.startswith("granq: error: ") and re.search(words, said)):
        return []
    return [f"exit code {code}, said {said!r}"]


def _two_runs(command: Command, out: Path, seconds: float, rng: random.Random) -> tuple[int, list[str]]:
    """A second process wants the folder at a random moment of the first; one of them must be told, the other end well."""
    logs = [out.with_suffix(f".log{i}") for i in range(2)]
    first = start(command.arguments(out), logs[0])
    time.sleep(0.3 * rng.random() * seconds)
    second = start(command.arguments(out, resume=rng.random() < 0.7), logs[1])
    codes = [ended(pid) for pid in (first, second)]
    problems = [f"exit codes {codes}"] if sorted(codes) not in ([0, 0], [0, 2]) else []
    for code, log in zip(codes, logs):
        if code == 2 and not re.search(r"in use by another process|holds a run;|is not empty", last_line(log)):
            problems.append(f"said {last_line(log)!r}")
    return max(codes), problems


@contextlib.contextmanager
def _ranks(command: Command, out: Path, resume: bool = False) -> Iterator[list[int]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def join(rank: int) -> Callable[[], None]:
        return lambda: os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    yield [start(command.arguments(out, resume), out.with_suffix(f".rank{r}"), join(r)) for r in range(2)]


def run_ranks(command: Command, out: Path, resume: bool = False) -> list[int]:
    """The exit codes of two ranks, as torchrun starts them."""
    with _ranks(command, out, resume) as pids:
        return [ended(pid) for pid in pids]


def _dead_rank(command: Command, out: Path, seconds: float, rng: random.Random) -> tuple[int, list[str]]:
    """SIGKILL to one of two ranks; the other must end by itself, or wait for a rank that never came until torchrun's agent, which
    is played here, ends it."""
    with _ranks(command, out) as pids:
        time.sleep(0.1 + 1.5 * rng.random() * seconds)
        victim = rng.randrange(2)
        os.kill(pids[victim], signal.SIGKILL)
        ended(pids[victim])
        try:
            code = ended(pids[1 - victim], AGENT_SECONDS)
        except TimeoutError:
            code = -signal.SIGKILL
    said = last_line(out.with_suffix(f".rank{1 - victim}"))
    if code in (0, -signal.SIGKILL) or (code == 2 and said.startswith("granq: error: rank")):
        return code, []
    return code, [f"rank {1 - victim}: exit code {code}, said {said!r}"]


AGENT_SECONDS = 30
"""After which torchrun kills what has not ended."""

FAULTS: dict[str, Fault] = {
    "SIGKILL": _by_signal(signal.SIGKILL, -signal.SIGKILL, ""),
    "SIGTERM": _by_signal(signal.SIGTERM, 143, "terminated"),
    "Ctrl-C": _by_signal(signal.SIGINT, 130, "interrupted"),
    "full disk": _full_disk,
    "read-only folder": _read_only,
    "two runs in one folder": _two_runs,
    "a rank dies": _dead_rank,
}


def try_fault(kind: str, command: Command, out: Path, expected: dict[str, str], seconds: float, rng: random.Random) -> Tried:
    """Inject a fault into a command that takes so many seconds, look at its files, and give the command again."""
    out.mkdir(parents=True)
    code, problems = FAULTS[kind](command, out, seconds, rng)
    broken = damaged(out)
    if kind == "a rank dies":
        again = max(run_ranks(command, out, resume=True))
    else:
        again, _ = run(command.arguments(out, resume=True), out.with_suffix(".again"))
    logs = {log.name: log.read_text(errors="replace") for log in out.parent.glob(f"{out.name}.*")}
    problems += broken + [f"{name}: {text[-2000:]}" for name, text in logs.items() if "Traceback" in text or again]
    found = digests(out)
    if found != expected:
        problems.append(f"other results: {[k for k in expected | found if expected.get(k) != found.get(k)]}")
    return Tried(code, tuple(problems), bool(broken or again), found == expected)
