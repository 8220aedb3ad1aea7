"""``granq train-teacher``."""

import sys
from pathlib import Path

import click

from granq_plugin.cli.options import (
    advance,
    complete_names,
    dataset_option,
    help_config,
    input_errors,
    open_device,
    presets_text,
    settings_from,
)

__all__ = ["train_teacher"]


def _settings_text() -> str:
    from zoo.train import TRAIN_PRESETS, TrainConfig
    return presets_text(TRAIN_PRESETS, TrainConfig())


@click.command("train-teacher")
@click.argument("name", shell_complete=complete_names(float_only=True))
@dataset_option
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", envvar="GRANQ_DATA", show_envvar=True,
              help="Folder with the training images, and the test images for the accuracy at the end; the digits need none.")
@click.option("--out", type=click.Path(path_type=Path), metavar="RUN_DIR", required=True,
              help="Folder for everything that the run leaves; a new one, or with --resume that of the same run.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE",
              help="TOML file of settings that differ from the data set's.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="One more setting; may be repeated.")
@help_config(_settings_text)
@click.option("--holdout", type=click.IntRange(min=1), metavar="N",
              help="For choosing settings: train without N images drawn at random, and print the accuracy on these instead of the "
              "test set's.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in RUN_DIR, if there is one.")
@click.option("--device", default="cpu", show_default=True, help="torch device, e.g. cuda.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's].")
def train_teacher(name, dataset, data, out, config_file, assignments, holdout, resume, device, threads) -> None:
    """Train a float network on labelled images, as a teacher.

    NAME is a float zoo entry, a card file PATH.toml, or module:function of your own. The teacher is for granq qat, which takes it
    with --weights. RUN_DIR gets config.toml, run.json, metrics.csv, checkpoint.pt (every epoch) and teacher.safetensors.

    \b
    Example:
      granq train-teacher resnet20_cifar100 --data DIR --out runs/teacher
    """
    with input_errors():
        from zoo.registry import card_of
        card = card_of(name, dataset)

    import torch
    from tqdm import tqdm

    import zoo.data
    import zoo.evaluate
    import zoo.train
    from granq_plugin.atomic import write_text
    from granq_plugin.zero_shot.outcome import save_tensors
    from granq_plugin.zero_shot.run_directory import add_to_run

    with input_errors():
        config = settings_from(zoo.train.train_preset(card.dataset), config_file, assignments)
        if threads:
            torch.set_num_threads(threads)
        device = open_device(device)
        images = zoo.data.in_memory(zoo.data.load_images(data, card.dataset, "train", card=card))
        if holdout:
            images, judged = images.split(holdout, config.seed)
        else:
            judged = zoo.data.load_images(data, card.dataset, card=card)
            if card.dataset not in zoo.data.BUNDLED and judged.source == images.source:
                raise ValueError(f"{images.source!r} has no test images beside those to train on: give --holdout N, or sort them "
                                 "into train/CLASS and test/CLASS")
        zoo.evaluate.check_images(judged, card.preprocessing)
        torch.manual_seed(config.seed)
        model = card.build().to(device)

    def evaluate(network) -> zoo.evaluate.Accuracy:
        return zoo.evaluate.evaluate(network, judged, card.preprocessing, device=device)

    def on_epoch(row: dict) -> None:
        bar.write(f"epoch {row['epoch']}/{config.epochs}  size {row['image_size']}  loss {row['loss']:.3f}  "
                  f"training accuracy {row['train_accuracy']:.1f} %  {row['images_per_second']:.0f} img/s", file=sys.stderr)

    total = config.epochs * (len(images) // config.batch_size)
    with tqdm(total=total, unit="step", mininterval=1, disable=None) as bar, input_errors():
        zoo.train.train_teacher(
            model, images, card.preprocessing, config, run_dir=out, resume=resume,
            on_step=lambda done, _: advance(bar, done), on_epoch=on_epoch)
    with input_errors():
        accuracy = evaluate(model)
        summary = dict(
            network=name, dataset=card.dataset, teacher_sha256=save_tensors(out / "teacher.safetensors", model.state_dict()),
            images="held-out training" if holdout else "test", **{f"{'holdout' if holdout else 'test'}_images": len(judged)},
            top1=accuracy.top1, top5=accuracy.top5, command=" ".join(["granq", *sys.argv[1:]]))
        if name != card.name:  # of the user's own
            write_text(out / "card.toml", card.to_toml())
        add_to_run(out, summary)
    click.echo(f"{name}: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % on {len(judged)} {summary['images']} images "
               f"(last of {config.epochs} epochs)\n  {out}/teacher.safetensors")
