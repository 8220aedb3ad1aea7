"""What is asked of any model."""

import copy

from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import nn

__all__ = ["check_module", "copy_model", "is_quantized"]


def check_module(model) -> None:
    """Raise a TypeError for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def is_quantized(model: nn.Module) -> bool:
    """Whether a Brevitas quantizer of the model is switched on."""
    return any(isinstance(m, QuantProxyFromInjector) and m.is_quant_enabled for m in model.modules())


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy. Raises a ValueError for a model that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as e:  # weights computed by torch.nn.utils.weight_norm, locks, open files
        raise ValueError(f"model cannot be copied ({e}); conversions take inplace=True") from e
