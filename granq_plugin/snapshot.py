"""A module as it is at one moment, to be put back after somebody's code has run on it."""

import operator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Snapshot"]


class Snapshot:
    """The attributes of a module and its submodules, and the values of their parameters and buffers.

    Args:
        model: any module. Its tensors are copied, its other attributes referred to; dictionaries and lists one level deep.
        parameters: False: parameters are referred to, too, which takes neither memory nor time.
    """

    def __init__(self, model: nn.Module, parameters: bool = True) -> None:
        self._attributes = [(vars(m), {k: (v, _items(v)) for k, v in vars(m).items()}) for m in model.modules()]
        tensors = (*model.buffers(), *(model.parameters() if parameters else ()))
        self._tensors = [(t, t.detach().clone()) for t in tensors if not is_lazy(t)]

    def holds(self) -> bool:
        """Whether every attribute still is what it was, and every parameter and buffer has its value."""
        return (all(_unchanged(now, was) for now, was in self._attributes)
                and all(_equal(t, value) for t, value in self._tensors))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for now, was in self._attributes:
            if _unchanged(now, was):  # and not touched, for other threads may be using it
                continue
            now.clear()
            for k, (v, items) in was.items():
                now[k] = v
                if items is not None:
                    v.clear()
                    v.update(items) if isinstance(v, dict) else v.extend(items)
        for t, value in self._tensors:
            if t.shape != value.shape:
                t.data = value.clone()
            elif not _equal(t, value):
                t.copy_(value)


def _unchanged(now: dict, was: dict) -> bool:
    return now.keys() == was.keys() and all(now[k] is v and _same(v, items) for k, (v, items) in was.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    """NaN equal to NaN; what has no values, to anything of its shape."""
    return a.shape == b.shape and (a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all()))


def _items(v) -> dict | list | None:
    """A shallow copy of a dictionary or list."""
    return v.copy() if isinstance(v, (dict, list)) else None


def _same(v, items: dict | list | None) -> bool:
    """Whether a dictionary or list has these items, by identity, since tensors do not compare."""
    if items is None:
        return True
    if isinstance(items, dict):
        return v.keys() == items.keys() and all(v[k] is items[k] for k in items)
    return len(v) == len(items) and all(map(operator.is_, v, items))
