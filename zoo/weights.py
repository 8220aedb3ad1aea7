"""Float weights from files of other projects, without running their code."""

import hashlib
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["load_weights", "read_state_dict", "sha256"]


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict: ``.safetensors``, or a torch file (only tensors are unpickled), possibly under a "state_dict" key and
    with the ``module.`` prefix of DataParallel.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {str(path)!r} " + ("is a folder" if path.is_dir() else "does not exist"))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            entries = load_file(path)
        else:
            entries = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # torch's own words advise to switch its protection off
        raise ValueError(f"{str(path)!r} is not a readable weights file: it is damaged, or holds more than tensors") from e
    except Exception as e:  # a damaged file raises anything, from EOFError to safetensors' own class
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"{str(path)!r} is not a readable weights file (.safetensors or a torch state dict): {reason}") from e
    if isinstance(entries, dict) and isinstance(entries.get("state_dict"), dict):
        entries = entries["state_dict"]
    if not isinstance(entries, dict) or not entries or not all(isinstance(v, Tensor) for v in entries.values()):
        raise ValueError(f"{str(path)!r} holds no state dict (a dict of names to tensors)")
    return {str(k).removeprefix("module."): v for k, v in entries.items()}


# The same network under other names: (theirs, ours), of chenyaofo/pytorch-cifar-models.
_RENAMED = (("downsample.", "shortcut."), ("fc.", "linear."))


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for theirs, ours in _RENAMED:
        state = {re.sub(rf"(^|\.){re.escape(theirs)}", rf"\1{ours}", k): v for k, v in state.items()}
    return state


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file's weights into ``model``, all of them or none. Names may be those of chenyaofo/pytorch-cifar-models.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_state_dict`; ValueError also for weights of another architecture.
    """
    state, expected = read_state_dict(path), model.state_dict()
    if not expected.keys() <= state.keys() and expected.keys() <= (renamed := _renamed(state)).keys():
        state = renamed
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shapes = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if missing or unexpected or shapes:
        problems = [f"{len(missing)} entries missing (first: {missing[0]})"] if missing else []
        problems += [f"{len(unexpected)} not of this network (first: {unexpected[0]})"] if unexpected else []
        problems += [f"{len(shapes)} of another shape (first: {shapes[0]}, {tuple(state[shapes[0]].shape)} instead of "
                     f"{tuple(expected[shapes[0]].shape)})"] if shapes else []
        raise ValueError(f"{str(path)!r} holds weights of another architecture: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)
