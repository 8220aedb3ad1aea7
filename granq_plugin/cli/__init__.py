"""The ``granq`` command line: thin, each verb calls public functions. Bad input: one line on stderr, exit code 2."""

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

import click

__all__ = ["cli", "run"]

# verb -> module:function, imported when the verb or the list of verbs is asked for. These modules import torch and the rest of
# the package inside their functions, so that help comes at once.
VERBS = {
    "demo": "granq_plugin.cli.demo:demo",
    "evaluate": "granq_plugin.cli.evaluate:evaluate",
    "train-teacher": "granq_plugin.cli.train:train_teacher",
    "qat": "granq_plugin.cli.qat:qat",
    "export": "granq_plugin.cli.export:export",
    "verify": "granq_plugin.cli.export:verify",
    "report": "granq_plugin.cli.export:report",
    "ranges": "granq_plugin.cli.export:ranges",
    "zoo": "granq_plugin.cli.zoo:zoo",
}

RESUMABLE = ("qat", "train-teacher")
"""Verbs with --resume; everything else is started again."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does: temporary files are removed, and one line is said."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM (in the main thread, where signals arrive)."""
    def stop(*_) -> None:
        raise Terminated
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LazyGroup(click.Group):
    """A group of :data:`VERBS` in their order (pattern: "Lazily Loading Subcommands" in click's documentation)."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module, function = VERBS[name].split(":")
        return getattr(importlib.import_module(module), function)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="granq-plugin")
@click.pass_context
def cli(context: click.Context) -> None:
    """Per-channel low-bit quantization of trained networks (GranQ) for Brevitas.

    \b
    Example:
      granq demo
      granq zoo list
      granq qat --help
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run(args: list[str] | None = None) -> int:
    """Run ``granq`` with ``args`` (default: the process's) and return its exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of a CUDA compiler without a GPU
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for networks of the user's own; last, so that nothing there hides a package
    try:
        with _terminable():
            return cli.main(args, prog_name="granq", standalone_mode=False) or 0
    except click.ClickException as e:
        click.echo(f"granq: error: {e.format_message()}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt) as e:
        terminated = isinstance(e, Terminated) or isinstance(e.__cause__, Terminated)
        verb = next(iter(sys.argv[1:] if args is None else args), "")
        hint = "; the same command with --resume goes on from the last checkpoint, if there is one" if verb in RESUMABLE else ""
        click.echo(f"granq: {'terminated' if terminated else 'interrupted'}{hint}", err=True)
        return 143 if terminated else 130
