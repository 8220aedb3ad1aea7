"""What a run leaves on disk: its settings, checkpoints, metrics and result, each file whole or not there."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from brevitas.proxy import WeightQuantProxyFromInjector
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import nn

from granq_plugin._version import __version__
from granq_plugin.atomic import atomic_path, write_text
from granq_plugin.reading import load_torch, read_json, reason_of
from granq_plugin.settings import Settings
from granq_plugin.zero_shot import parallel

try:
    import fcntl
except ModuleNotFoundError:  # Windows: two runs in one folder are not noticed
    fcntl = None

__all__ = ["RunDirectory", "add_to_run", "fingerprint"]

# They say how often to save and how to compute, not what: a resumed run may change them.
_FREE_SETTINGS = ("checkpoint_every", )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a model's state, and over the bit widths of its quantizers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            copy = value.detach().cpu().contiguous().clone()  # numpy would pin the storage of a buffer that is yet to grow
            digest.update(copy.reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, proxy in model.named_modules():
        if isinstance(proxy, QuantProxyFromInjector) and proxy.is_quant_enabled:
            digest.update(f"{name} {type(proxy).__name__} {proxy.bit_width()}\n".encode())
    return digest.hexdigest()


def bit_widths(model: nn.Module) -> str:
    """The bit widths of a model's quantizers in words, e.g. "weights 4, 8, activations 4"; empty for a float one."""
    words = []
    for name, kind in (("weights", WeightQuantProxyFromInjector), ("activations", ActQuantProxyFromInjectorBase)):
        found = {int(bits) for m in model.modules()
                 if isinstance(m, kind) and m.is_quant_enabled and (bits := m.bit_width()) is not None}
        words += [f"{name} {', '.join(map(str, sorted(found)))}"] if found else []
    return ", ".join(words)


class RunDirectory:
    """A folder that belongs to one run: ``config.toml``, ``run.json``, ``checkpoint.pt``, ``metrics.csv``; rank 0 writes it.

    A context manager: until its end, no other process can use the folder.

    Args:
        path: the folder; it is made if need be.
        config: the run's settings. networks: by what they are in the run ("teacher", "student"), before training.
        resume: go on with the run that the folder holds; a folder without one starts it.

    Raises:
        FileExistsError: if another process uses the folder; if it holds a run, and resume is False; if it holds anything else.
        ValueError: if it holds a run with other settings or networks. NotADirectoryError: for a file.
    """

    def __init__(self, path: str | Path, config: Settings, networks: dict[str, nn.Module], resume: bool) -> None:
        self.path, self._lock = Path(path), None
        self._states = {f"{who}_state_sha256": fingerprint(network) for who, network in networks.items()}
        self._bits = {f"{who}_bits": bits for who, network in networks.items() if (bits := bit_widths(network))}
        self.identity = self._states | self._bits | dict(version=__version__, torch=torch.__version__)
        parallel.from_first_rank(lambda: self._prepare(config, resume))

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _prepare(self, config: Settings, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"run directory {str(self.path)!r} is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        try:
            self._open(config, resume)
        except BaseException:
            self.__exit__()
            raise

    def _take(self) -> None:
        """Lock the folder itself: no file is left behind, and the kernel lets go when the process dies."""
        if fcntl is None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self.__exit__()
            raise FileExistsError(f"run directory {str(self.path)!r} is in use by another process; wait for its end, or choose "
                                  "another folder") from e
        except OSError:
            pass  # a file system without locks

    def _open(self, config: Settings, resume: bool) -> None:
        parts = [f for f in self.path.iterdir() if re.fullmatch(r".+\.part\d+", f.name)]  # of a process that was killed
        others = {f.name for f in self.path.iterdir()} - {f.name for f in parts} - {"tensorboard"}
        known = {}
        if "run.json" in others:
            if not resume:
                raise FileExistsError(
                    f"run directory {str(self.path)!r} holds a run; go on with it (--resume; in Python resume=True), or choose "
                    "another folder")
            known = self._check_same_run(config)
        elif (not resume and (others or parts)) or not others <= {"config.toml"}:  # a killed process had not come further
            raise FileExistsError(f"run directory {str(self.path)!r} is not empty and holds no run; choose another folder")
        for part in parts:
            part.unlink()
        write_text(self.path / "config.toml", config.to_toml())
        write_text(self.path / "run.json", json.dumps(known | self.identity, indent=2) + "\n")

    def _check_same_run(self, config: Settings) -> dict:
        """What run.json says, if the folder holds this run."""
        stored = type(config).from_file(self.path / "config.toml")
        names = [n for n in vars(config) if n not in _FREE_SETTINGS and getattr(stored, n) != getattr(config, n)]
        differences = [f"{n} was {getattr(stored, n)!r}, is {getattr(config, n)!r}" for n in names]
        identity = read_json(self.path / "run.json")
        for name, state in self._states.items():
            if identity.get(name) != state:
                who = name.removesuffix("_state_sha256")
                was, now = (bits.get(f"{who}_bits") for bits in (identity, self._bits))
                how = f" (bits were {was}, are {now})" if was != now else ""
                differences.append(f"another {who}{how or ', or one that was trained since: give it as it was at first'}")
        if differences:
            raise ValueError(f"run directory {str(self.path)!r} holds a different run: {'; '.join(differences)}")
        return identity

    def save_checkpoint(self, state: dict) -> None:
        """Replace the checkpoint, whole or not at all."""
        if parallel.rank() > 0:
            return
        with atomic_path(self.path / "checkpoint.pt") as part:
            try:
                torch.save(state, part)
            except RuntimeError as e:  # torch's writer hides the reason
                raise OSError(f"the disk is full, or failing ({reason_of(e)})") from e

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[dict | None]:
        """The last checkpoint, or None, for a block that restores it.

        Raises:
            ValueError: if it is damaged; that is also what anything means that the block raises over it.
        """
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            yield None
            return
        try:
            state = load_torch(path)
            if not all(isinstance(v, (int, float)) for row in state["metrics"] for v in row.values()):
                raise ValueError("its metrics are not numbers")
            yield state
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            raise ValueError(f"checkpoint {str(path)!r} is damaged ({reason_of(e)}); remove it to start again") from e

    def save_metrics(self, rows: list[dict]) -> None:
        """Write ``metrics.csv``, a line per epoch; a value that an epoch lacks is empty."""
        if parallel.rank() > 0:
            return
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "metrics.csv", text.getvalue())


def add_to_run(path: str | Path, entries: dict) -> None:
    """Add plain values to the ``run.json`` of a run's folder. Raises an OSError if it cannot be read or written."""
    file = Path(path) / "run.json"
    write_text(file, json.dumps(read_json(file) | entries, indent=2) + "\n")
