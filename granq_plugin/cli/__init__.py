"""The ``granq`` command line: thin, each verb calls public functions. Bad input: one line on stderr, exit code 2."""

import click

from granq_plugin.cli.demo import demo
from granq_plugin.cli.evaluate import evaluate
from granq_plugin.cli.export import export, report, verify
from granq_plugin.cli.qat import qat
from granq_plugin.cli.train import train_teacher
from granq_plugin.cli.zoo import zoo

__all__ = ["cli", "run"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="granq-plugin")
@click.pass_context
def cli(context: click.Context) -> None:
    """Per-channel low-bit quantization of trained networks (GranQ) for Brevitas."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for verb in (demo, evaluate, train_teacher, qat, export, verify, report, zoo):
    cli.add_command(verb)


def run(args: list[str] | None = None) -> int:
    """Run ``granq`` with ``args`` (default: the process's) and return its exit code."""
    try:
        return cli.main(args, prog_name="granq", standalone_mode=False) or 0
    except click.ClickException as e:
        click.echo(f"granq: error: {e.format_message()}", err=True)
        return 2
    except click.Abort:
        click.echo("granq: interrupted", err=True)
        return 130
