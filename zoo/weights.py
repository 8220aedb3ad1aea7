"""Float weights from files of other projects, without running their code."""

import hashlib
import re
from pathlib import Path

from torch import Tensor, nn

from granq_plugin.reading import existing_file, load_torch, reason_of

__all__ = ["load_weights", "read_state_dict", "sha256"]


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_state_dict(path: str | Path, what: str = "weights file") -> dict[str, Tensor]:
    """Read a state dict: ``.safetensors``, or a torch file (only tensors are unpickled), possibly under a key "state_dict" or
    "model", and with the ``module.`` prefix of DataParallel.

    Args:
        what: what errors call it.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it holds no state dict.
    """
    path = existing_file(path, what)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            entries = load_file(path)
        else:
            entries = load_torch(path)
    except Exception as e:  # safetensors' own class, or whatever its conversion to tensors raises
        reason = reason_of(e).removeprefix(f"{str(path)!r} is ")
        raise ValueError(f"{str(path)!r} is not a readable {what} (.safetensors or a torch state dict): {reason}") from e
    for key in ("state_dict", "model"):
        if isinstance(entries, dict) and isinstance(entries.get(key), dict):
            entries = entries[key]
    if not isinstance(entries, dict) or not entries or not all(isinstance(v, Tensor) for v in entries.values()):
        keys = f", but {', '.join(sorted(map(repr, entries))[:5])}" if isinstance(entries, dict) and entries else ""
        raise ValueError(f"{str(path)!r} holds no state dict (a dict of names to tensors){keys}; save model.state_dict()")
    return {str(k).removeprefix("module."): v for k, v in entries.items()}


# The same network under other names, as (theirs, ours): regular expressions on whole names, applied one after the other.
_CHENYAOFO = ((r"(^|\.)downsample\.", r"\1shortcut."), (r"^fc\.", "linear."))
_PYTORCHCV = (
    (r"^features\.init_block\.(?:conv\.)?bn\.", "bn1."), (r"^features\.init_block\.(?:conv\.)?conv\.", "conv1."),
    (r"^features\.stage(\d+)\.unit(\d+)\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}."),
    (r"\.body\.conv(\d)\.conv\.", r".conv\1."), (r"\.body\.conv(\d)\.bn\.", r".bn\1."),
    (r"\.identity_conv\.conv\.", ".shortcut.0."), (r"\.identity_conv\.bn\.", ".shortcut.1."), (r"^output\.", "linear."))
_TORCHVISION = ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."))
_LAYOUTS = ((), _CHENYAOFO, _PYTORCHCV, (*_PYTORCHCV, *_TORCHVISION), _TORCHVISION)


def _renamed(state: dict[str, Tensor], layout: tuple) -> dict[str, Tensor]:
    for theirs, ours in layout:
        state = {re.sub(theirs, ours, k): v for k, v in state.items()}
    return state


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file's weights into ``model``, all of them or none.

    ResNets may have the names of akamaster/pytorch_resnet_cifar10, chenyaofo/pytorch-cifar-models, pytorchcv or torchvision,
    whichever the model's own are. Shortcuts must be of one kind: padding (akamaster's) has no weights, 1x1 convolutions do.
    Names do not tell where a bottleneck has its stride: pytorchcv's ``resnet50`` has it in the first convolution, ``resnet50b`` and
    torchvision in the second; load the former into pytorchcv's own function.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_state_dict`; ValueError also for weights of another architecture.
    """
    state, expected = read_state_dict(path), model.state_dict()
    needed = {k for k in expected if not k.endswith("num_batches_tracked")}
    state = next((named for named in (_renamed(state, layout) for layout in _LAYOUTS) if needed <= named.keys()), state)
    missing = [k for k in expected if k in needed and k not in state]
    unexpected = [k for k in state if k not in expected]
    shapes = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    kinds = [k for k in expected if k in needed and k in state and not shapes
             and (state[k].is_floating_point() != expected[k].is_floating_point() or state[k].is_complex())]
    broken = [k for k in needed & state.keys() if state[k].is_floating_point() and not state[k].isfinite().all()]
    if missing or unexpected or shapes or kinds:
        problems = [f"{len(missing)} entries missing (first: {missing[0]})"] if missing else []
        problems += [f"{len(unexpected)} not of this network (first: {unexpected[0]})"] if unexpected else []
        problems += [f"{len(shapes)} of another shape (first: {shapes[0]}, {tuple(state[shapes[0]].shape)} instead of "
                     f"{tuple(expected[shapes[0]].shape)})"] if shapes else []
        problems += [f"{len(kinds)} of another kind of number (first: {kinds[0]}, {state[kinds[0]].dtype})"] if kinds else []
        raise ValueError(f"{str(path)!r} holds weights of another architecture: {'; '.join(problems)}")
    if broken:
        raise ValueError(f"{str(path)!r} holds values that are not finite, in {min(broken)}")
    model.load_state_dict(state, strict=False)
