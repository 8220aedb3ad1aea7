"""What a run leaves on disk: its settings, checkpoints, metrics and result, each file whole or not there."""

import csv
import hashlib
import io
import json
from pathlib import Path

import torch
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import nn

from granq_plugin._version import __version__
from granq_plugin.atomic import atomic_path, write_text
from granq_plugin.settings import Settings
from granq_plugin.zero_shot import parallel

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


class RunDirectory:
    """A folder that belongs to one run: ``config.toml``, ``run.json``, ``checkpoint.pt``, ``metrics.csv``; rank 0 writes it.

    Args:
        path: the folder; it is made if need be.
        config: the run's settings. networks: by what they are in the run ("teacher", "student"), before training.
        resume: go on with the run that the folder holds; a folder without one starts it.

    Raises:
        FileExistsError: if the folder holds a run, or any other file, and resume is False.
        ValueError: if it holds a run with other settings or networks. NotADirectoryError: for a file.
    """

    def __init__(self, path: str | Path, config: Settings, networks: dict[str, nn.Module], resume: bool) -> None:
        self.path = Path(path)
        self._states = {f"{who}_state_sha256": fingerprint(network) for who, network in networks.items()}
        self.identity = self._states | dict(version=__version__, torch=torch.__version__)
        parallel.from_first_rank(lambda: self._prepare(config, resume))

    def _prepare(self, config: Settings, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"run directory {str(self.path)!r} is a file")
        if (self.path / "run.json").is_file():
            if not resume:
                raise FileExistsError(f"run directory {str(self.path)!r} holds another run; resume it, or choose another folder")
            self._check_same_run(config)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise FileExistsError(f"run directory {str(self.path)!r} is not empty and holds no run; choose another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.toml", config.to_toml())
        write_text(self.path / "run.json", json.dumps(self.identity, indent=2) + "\n")

    def _check_same_run(self, config: Settings) -> None:
        stored = type(config).from_file(self.path / "config.toml")
        names = [n for n in vars(config) if n not in _FREE_SETTINGS and getattr(stored, n) != getattr(config, n)]
        differences = [f"{n} was {getattr(stored, n)!r}, is {getattr(config, n)!r}" for n in names]
        identity = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        differences += [f"another {name.removesuffix('_state_sha256')}" for name, state in self._states.items()
                        if identity.get(name) != state]
        if differences:
            raise ValueError(f"run directory {str(self.path)!r} holds a different run: {'; '.join(differences)}")

    def save_checkpoint(self, state: dict) -> None:
        """Replace the checkpoint, whole or not at all."""
        if parallel.rank() > 0:
            return
        with atomic_path(self.path / "checkpoint.pt") as part:
            try:
                torch.save(state, part)
            except RuntimeError as e:  # torch's writer reports a full disk so
                raise OSError(f"{e}") from e

    def load_checkpoint(self) -> dict | None:
        """The last checkpoint, or None. Raises a ValueError if it is damaged."""
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # anything comes out of a damaged file
            raise ValueError(f"checkpoint {str(path)!r} is damaged ({type(e).__name__}); remove it to start again") from e

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
    known = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, json.dumps(known | entries, indent=2) + "\n")
