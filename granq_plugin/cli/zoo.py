"""``granq zoo``: list, card, evaluate, add."""

from pathlib import Path

import click

from granq_plugin.cli.options import input_errors

__all__ = ["zoo"]

zoo_option = click.option("--zoo", "zoo_dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                          help="Another zoo's folder than the installed one.")
data_option = click.option("--data", type=click.Path(path_type=Path), metavar="DIR", envvar="GRANQ_DATA", show_envvar=True,
                           help="Folder with the test images.")


@click.group()
def zoo() -> None:
    """The model zoo: networks with cards, found by name."""


@zoo.command("list")
@click.argument("pattern", default="*")
@zoo_option
def list_entries(pattern, zoo_dir) -> None:
    """List the entries that match a shell PATTERN, such as 'resnet20*'."""
    with input_errors():
        from zoo import get_card, list_models
        names = list_models(pattern, zoo_dir)
        if not names:
            raise ValueError(f"no zoo entry matches {pattern!r}; entries are: {', '.join(list_models('*', zoo_dir)) or 'none'}")
        width = max(map(len, names))
        for name in names:
            card = get_card(name, zoo_dir)
            top1 = f"{card.results.top1:6.2f} %" if card.results else "       -"
            size = f"{card.weights.bytes / 1000:8.0f} kB" if card.weights else "not shipped"
            click.echo(f"{name:{width}}  {card.dataset:9}  top-1 {top1}  {size:>11}")


@zoo.command("card")
@click.argument("name")
@zoo_option
def show_card(name, zoo_dir) -> None:
    """Print the card of an entry, as TOML."""
    with input_errors():
        from zoo import get_card
        click.echo(get_card(name, zoo_dir).to_toml(), nl=False)


@zoo.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Name of the entry  [default: NETWORK.granq_w4a4... or, of a float one, NETWORK].")
@click.option("--license", metavar="TEXT", help="Terms of the weights  [default: the teacher's].")
@click.option("--batch-size", type=click.IntRange(min=1), help="Of the evaluation.")
@click.option("--overwrite", is_flag=True, help="Replace an entry of that name that has weights.")
@data_option
@zoo_option
def add(run_dir, name, license, batch_size, overwrite, data, zoo_dir) -> None:
    """Publish a finished run: pack its weights, evaluate what was packed, and write card, log and settings.

    RUN_DIR is one of granq qat, or of granq train-teacher.

    \b
    Example:
      granq zoo add runs/w3a3 --data DIR
    """
    if data is None:
        raise click.UsageError("no data folder: give --data DIR or set GRANQ_DATA")
    from tqdm import tqdm
    with input_errors():
        import zoo
        from zoo.data import load_images
        from zoo.publish import entry_of_run, write_entry
        zoo_dir = zoo_dir or Path(zoo.__file__).parent
        with tqdm(unit="img") as bar:

            def load(card):
                test_set = load_images(data, card.dataset)
                bar.total = len(test_set)
                return test_set
            entry = entry_of_run(run_dir, load, name=name, license=license, progress=bar.update,
                                 **{} if batch_size is None else dict(batch_size=batch_size))
        files = write_entry(entry, zoo_dir, overwrite=overwrite)
    card = entry.card
    click.echo(f"{card.name}: top-1 {card.results.top1:.2f} %, {card.weights.bytes:,} bytes\n  " + "\n  ".join(map(str, files)))
