"""What several verbs share: option types and values, and how bad input becomes an error."""

import contextlib
import json
import os
from pathlib import Path

import click

__all__ = [
    "BitWidth", "advance", "compile_option", "complete_names", "complete_presets", "dataset_option", "help_config", "input_errors",
    "join_ranks", "open_device", "presets_text", "settings_from"]

_EXTRAS = dict(hls4ml="hls", tensorboard="tensorboard") | dict.fromkeys(
    ("matplotlib", "safetensors", "sklearn", "torchvision"), "zoo") | dict.fromkeys(
    ("onnx", "onnxoptimizer", "onnxruntime", "onnxscript", "qonnx"), "export")
"""Which extra brings a package."""
MOST_WORDS = 2000
"""Characters of an error: a value in it may be of any length."""


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
    except BrokenPipeError:  # the reader of the output has seen enough, as in `| head`: click ends silently
        raise
    except (ValueError, TypeError, OSError, FloatingPointError) as e:
        raise click.ClickException(_one_line(e)) from e
    except (MemoryError, RuntimeError) as e:
        import torch.distributed as dist
        if _is_memory(e):
            raise click.ClickException(f"not enough memory: {_one_line(e)}") from e
        if dist.is_available() and dist.is_initialized():  # gloo and NCCL have no class of their own for a lost connection
            raise click.ClickException(f"rank {dist.get_rank()} stops, another one failed or died: {_one_line(e)}") from e
        raise


def _is_memory(e: Exception) -> bool:
    """torch has a class for a GPU's memory alone."""
    return isinstance(e, MemoryError) or "out of memory" in str(e) or "not enough memory" in str(e) or "allocate memory" in str(e)


def _one_line(e: Exception) -> str:
    words = " ".join(str(e).split())
    return words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS // 2]} ... {words[-MOST_WORDS // 2:]}"


dataset_option = click.option(
    "--dataset", metavar="NAME", help="For module:function: the data set (cifar10, cifar100, digits, imagenet).")


compile_option = click.option(
    "--compile", type=click.Choice(["off", "cudagraphs"]), default="off", show_default=True,
    help="cudagraphs: on a GPU, the forward of a batch is recorded once and launched as one.")


def help_config(text):
    """The option ``--help-config``, which prints what ``text()`` returns and exits.

    Args:
        text: called when it is asked for, so that nothing is imported before.
    """
    def show(context: click.Context, _, value: bool) -> None:
        if value and not context.resilient_parsing:
            click.echo(text(), nl=False)
            context.exit()
    return click.option("--help-config", is_flag=True, is_eager=True, expose_value=False, callback=show,
                        help="Print presets and all settings, and exit.")


def complete_names(float_only: bool = False):
    """A ``shell_complete`` for arguments that name zoo entries; without torch, and in the zoo of ``--zoo`` where it is given."""
    def complete(context: click.Context, _, incomplete: str) -> list[str]:
        from zoo.registry import get_card, list_models
        zoo_dir = context.params.get("zoo_dir")
        names = [name for name in list_models("*", zoo_dir) if name.startswith(incomplete)]
        return [name for name in names if not float_only or get_card(name, zoo_dir).quantization is None]
    return complete


def complete_presets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """A ``shell_complete`` for ``--preset``."""
    from granq_plugin.zero_shot.config import PRESETS
    return [name for name in PRESETS if name.startswith(incomplete)]


def advance(bar, done: int) -> None:
    """Move a progress bar to ``done`` steps, one more than before; speed and time left of a resumed run count from its first."""
    if bar.n == 0:
        bar.initial = bar.n = done - 1
    bar.update(1)


class BitWidth(click.ParamType):
    """A whole number from 1 to 16."""
    name = "bits"

    def convert(self, value, param, ctx):
        if ctx is not None and ctx.resilient_parsing:
            return value  # shell completion: nobody computes with it, and it must not wait for torch
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


def join_ranks(device: str) -> str:
    """Under torchrun, join the process group; returns this rank's device."""
    import torch.distributed as dist
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        on_gpu = device.startswith("cuda")
        dist.init_process_group("nccl" if on_gpu else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def presets_text(presets: dict, defaults) -> str:
    """All settings with their defaults and meaning, then what each preset (a data set's, for teachers) has instead."""
    lines = [f"# {name}: {config.differences(defaults) or 'the defaults'}\n" for name, config in presets.items()]
    return (f"# all settings, their defaults and their meaning\n{defaults.to_toml()}\n"
            f"# presets, and what they have instead\n{''.join(lines)}")


def settings_from(base, config_file: Path | None, assignments: tuple[str, ...]):
    """``base`` (:class:`granq_plugin.settings.Settings`), changed by a TOML file, then by single KEY=VALUE assignments."""
    config = base if config_file is None else type(base).from_file(config_file, base=base)
    return type(base).from_toml("\n".join(map(_toml_line, assignments)), base=config)


def _toml_line(assignment: str) -> str:
    key, equals, value = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {assignment!r}")
    try:
        json.loads(value)  # numbers, true, false and lists are TOML too; anything else is a string
    except json.JSONDecodeError:
        value = json.dumps(value)
    return f"{key} = {value}"
