"""What is asked of any model."""

import copy

from torch import nn

__all__ = ["check_module", "copy_model"]


def check_module(model) -> None:
    """Raise a TypeError for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy. Raises a TypeError for what is no model, a ValueError for one that cannot be copied."""
    check_module(model)
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as e:  # weights computed by torch.nn.utils.weight_norm, locks, open files
        raise ValueError(f"model cannot be copied ({e}); conversions take inplace=True") from e
