"""What several verbs share: option types and values, and how bad input becomes an error."""

import contextlib

import click

__all__ = ["BitWidth", "input_errors", "open_device"]

_EXTRAS = dict(hls4ml="hls", matplotlib="zoo", safetensors="zoo", tensorboard="tensorboard", torchvision="zoo") | dict.fromkeys(
    ("onnx", "onnxoptimizer", "onnxruntime", "onnxscript", "qonnx"), "export")
"""Which extra brings a package."""


@contextlib.contextmanager
def input_errors():
    """Turn what the library raises for bad input, or without a package, into the command line's error."""
    try:
        yield
    except ModuleNotFoundError as e:
        package = (e.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        raise click.ClickException(f"the package {package} is missing: pip install 'granq-plugin[{_EXTRAS[package]}]'") from e
    except (ValueError, TypeError, OSError, FloatingPointError) as e:
        raise click.ClickException(" ".join(str(e).split())) from e


class BitWidth(click.ParamType):
    """A whole number from 1 to 16."""
    name = "bits"

    def convert(self, value, param, ctx):
        from granq_plugin.functional import check_bit_width
        for number in (int, float):
            with contextlib.suppress(ValueError):
                value = number(value)
                break
        try:
            return check_bit_width(value)
        except (ValueError, TypeError) as e:
            self.fail(str(e), param, ctx)


def open_device(name: str):
    """The torch device, tried out. Raises a ValueError if it is not available."""
    import torch
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} is not available here: {str(e).splitlines()[0]}") from e
    return device
