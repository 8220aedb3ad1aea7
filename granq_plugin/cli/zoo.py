"""``granq zoo``: list, card, evaluate, add, table."""

from pathlib import Path

import click

from granq_plugin.cli.options import compile_option, complete_names, input_errors, join_ranks, open_device

__all__ = ["zoo"]

zoo_option = click.option("--zoo", "zoo_dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                          help="Another zoo's folder than the installed one.")
data_option = click.option("--data", type=click.Path(path_type=Path), metavar="DIR", envvar="GRANQ_DATA", show_envvar=True,
                           help="Folder with the test images; the digits need none.")
batch_option = click.option("--batch-size", type=click.IntRange(min=1),
                            help="Images of a forward  [default: 250; 50 from 64 pixels on].")
download_option = click.option("--download", is_flag=True, help="Fetch CIFAR's images to DIR with torchvision if they are absent.")


@click.group()
def zoo() -> None:
    """The model zoo: networks with cards, found by name.

    \b
    Example:
      granq zoo list
      granq zoo evaluate resnet8_digits.granq_w3a3
    """


@zoo.command("list")
@click.argument("pattern", default="*", shell_complete=complete_names())
@zoo_option
def list_entries(pattern, zoo_dir) -> None:
    """List entries: data set, accuracy, size.

    Those that match a shell PATTERN, e.g. "resnet20*".

    \b
    Example:
      granq zoo list 'resnet20*'
    """
    with input_errors():
        from zoo import get_card, list_models
        names = list_models(pattern, zoo_dir)
        if not names:
            raise ValueError(f"no zoo entry matches {pattern!r}; without a pattern all {len(list_models('*', zoo_dir))} are shown")
        width = max(map(len, names))
        for name in names:
            card = get_card(name, zoo_dir)
            top1 = f"{card.results.top1:6.2f} % of {card.results.images:5}" if card.results else f"{'-':>17}"
            size = f"{card.weights.bytes / 1000:.0f} kB" if card.weights else f"weights not shipped; source: granq zoo card {name}"
            click.echo(f"{name:{width}}  {card.dataset:9}  top-1 {top1}  {size}")


@zoo.command("card")
@click.argument("name", shell_complete=complete_names())
@zoo_option
def show_card(name, zoo_dir) -> None:
    """Print the card of an entry, as TOML.

    Where it comes from, how it was made, accuracy, costs, licences.

    \b
    Example:
      granq zoo card resnet20_cifar10.granq_w3a3
    """
    with input_errors():
        from zoo import get_card
        click.echo(get_card(name, zoo_dir).to_toml(), nl=False)


@zoo.command()
@click.argument("name", shell_complete=complete_names())
@data_option
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE",
              help="Float weights instead of the zoo's; a quantized entry quantizes them, without training.")
@click.option("--tolerance", type=click.IntRange(min=0), default=0, show_default=True, metavar="IMAGES",
              help="How far the counts of top-1 and top-5 may be from the card's; other machines add float32 in other orders.")
@click.option("--update-card", is_flag=True, help="Write what was found into the entry's card instead of comparing.")
@batch_option
@click.option("--device", default="cpu", show_default=True, help="torch device; under torchrun, cuda means each rank's own.")
@compile_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's].")
@download_option
@zoo_option
def evaluate(name, data, weights, tolerance, update_card, batch_size, device, compile, threads, download, zoo_dir) -> int:
    """Evaluate an entry, and compare it with its card.

    The exit code is 1 if the counts of correct test images differ by more than --tolerance.

    NAME is an entry or a card file PATH.toml. Under torchrun the ranks share the test set.

    \b
    Example:
      granq zoo evaluate resnet20_cifar10.granq_w3a3 --data DIR
    """
    import torch
    from tqdm import tqdm
    with input_errors():
        from granq_plugin.zero_shot import parallel
        from zoo.data import load_images
        from zoo.evaluate import check_compile, default_batch_size
        from zoo.evaluate import evaluate as count
        from zoo.publish import comparison, measured, write_card
        from zoo.registry import get_card, get_model
        from zoo.weights import sha256
        card = get_card(name, zoo_dir)
        device = open_device(join_ranks(device))
        check_compile(compile, device, parallel.world_size())
        if threads:
            torch.set_num_threads(threads)
        model = get_model(name, pretrained=weights is None, weights=weights, zoo_dir=zoo_dir)
        test_set = parallel.from_first_rank(lambda: load_images(data, card.dataset, card=card, download=download))
        world = parallel.world_size()
        with tqdm(total=len(test_set), unit="img", disable=parallel.rank() > 0 or None) as bar:
            accuracy = count(model, test_set, card.preprocessing, batch_size or default_batch_size(card.preprocessing), device,
                             lambda n: bar.update(min(n * world, len(test_set) - bar.n)), distributed=True, compile=compile)
    if parallel.rank() > 0:
        return 0
    digest = card.weights.sha256 if weights is None else sha256(weights)
    click.echo(f"{name} on {test_set.description} ({accuracy.total})")
    for label, count_of in (("top-1", accuracy.correct), ("top-5", accuracy.correct5)):
        click.echo(f"  {label} {accuracy.line(count_of)}")
    click.echo(f"  {accuracy.images_per_second:.0f} images/s, weights SHA-256 {digest[:12]}…")
    if update_card:
        with input_errors():
            path = write_card(measured(card, model.cpu(), accuracy, test_set, None if weights is None else digest), name, zoo_dir)
        click.echo(f"  written to {path}")
        return 0
    agrees, words = comparison(card, accuracy, test_set, None if weights is None else digest, tolerance)
    click.echo(f"  {words}")
    return 0 if agrees else 1


@zoo.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Name of the entry  [default: NETWORK.granq_w4a4... or, of a float one, NETWORK].")
@click.option("--license", metavar="TEXT", help="Terms of the weights  [default: the teacher's].")
@click.option("--overwrite", is_flag=True, help="Replace an entry of that name that has weights.")
@data_option
@batch_option
@download_option
@zoo_option
def add(run_dir, name, license, overwrite, data, batch_size, download, zoo_dir) -> None:
    """Publish a finished run as an entry.

    Packs its weights, evaluates what was packed, and writes card, log and settings.

    RUN_DIR is one of granq qat, or of granq train-teacher.

    \b
    Example:
      granq zoo add runs/w3a3 --data DIR
    """
    from tqdm import tqdm
    with input_errors():
        from zoo.data import load_images
        from zoo.publish import entry_of_run, write_entry
        with tqdm(unit="img", disable=None) as bar:

            def load(card):
                test_set = load_images(data, card.dataset, card=card, download=download)
                bar.reset(len(test_set))
                return test_set
            entry = entry_of_run(run_dir, load, name=name, license=license, batch_size=batch_size, progress=bar.update)
        files = write_entry(entry, zoo_dir, overwrite=overwrite)
    card = entry.card
    click.echo(f"{card.name}: top-1 {card.results.top1:.2f} % of {card.results.images}, {card.weights.bytes:,} bytes\n  "
               + "\n  ".join(map(str, files)))


@zoo.command()
@click.option("--readme", type=click.Path(path_type=Path), metavar="FILE", help="Replace the table between this file's markers.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Also draw zoo_accuracy.png and zoo_bit_operations.png there.")
@zoo_option
def table(readme, plots, zoo_dir) -> None:
    """Print the table of all results, as Markdown.

    Entries beside published ones; or write it, with its pictures.

    \b
    Example:
      granq zoo table --readme docs/results.md --plots benchmarks/results
    """
    with input_errors():
        from zoo import get_card, list_models
        from zoo.plots import plot
        from zoo.readme import replace_table
        from zoo.tables import MARKER
        from zoo.tables import table as table_of
        cards = [get_card(name, zoo_dir) for name in list_models("*", zoo_dir)]
        text = table_of(cards)
        if readme is not None:
            replace_table(MARKER, text, readme)
        if plots is not None:
            plot(cards, plots / "zoo_accuracy.png")
            plot(cards, plots / "zoo_bit_operations.png", against="bit_operations")
    click.echo(text)
