"""What README and docs/ say is true of the code: commands parse, links resolve, blocks of Python run, quoted messages exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from granq_plugin.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(command: click.Command, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command below one, with its words."""
    found = [(words, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found += commands(command.get_command(context, name), (*words, name))
    return found


COMMANDS = commands(cli)


def parse(line: str) -> None:
    """Parse a line ``granq ...`` as the command line does, without running it. Raises a click.UsageError."""
    command, (_, *words) = cli, shlex.split(line)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(click.Context(command), words)
        command = found
    command.make_context(line, [word for word in words if word not in ("--help", "-h", "--help-config")], resilient_parsing="--help" in words)
