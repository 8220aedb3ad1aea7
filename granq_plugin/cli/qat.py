"""``granq qat``."""

import sys
from pathlib import Path

import click

from granq_plugin.cli.options import (
    BitWidth,
    advance,
    complete_names,
    complete_presets,
    dataset_option,
    help_config,
    input_errors,
    join_ranks,
    open_device,
    presets_text,
    settings_from,
)
from zoo.quantization import ACT_RANGE_MODES, ACTIVATIONS, WEIGHT_RANGE_MODES, WEIGHT_REGIMES, Quantization

__all__ = ["qat"]


def _settings_text() -> str:
    from granq_plugin.zero_shot import PRESETS, ZeroShotConfig
    return presets_text(PRESETS, ZeroShotConfig())


@click.command()
@click.argument("name", shell_complete=complete_names(float_only=True))
@click.option("--out", type=click.Path(path_type=Path), metavar="RUN_DIR", required=True,
              help="Folder for everything that the run leaves; a new one, or with --resume that of the same run.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE",
              help="The float teacher's weights: .safetensors or a torch state dict  [default: those that the zoo ships].")
@dataset_option
@click.option("--weight-bits", type=BitWidth(), default=4, show_default=True, help="Bit width of the weights, 1 to 16.")
@click.option("--act-bits", type=BitWidth(), default=4, show_default=True, help="Bit width of the activations, 1 to 16.")
@click.option("--activations", type=click.Choice(ACTIVATIONS), default="dynamic", show_default=True,
              help="dynamic: the paper's. static: ranges follow the student, then freeze. folded: for FINN; needs --images.")
@click.option("--weight-regime", type=click.Choice(list(WEIGHT_REGIMES)),
              help="Granularity of the weights; per-kernel is for comparison with the paper only  [default: per-output-channel; "
              "with folded activations per-output-channel-symmetric].")
@click.option("--weight-range", type=click.Choice(WEIGHT_RANGE_MODES), default="minmax", show_default=True,
              help="Ranges of the weights: minmax, the paper's, or mse, of least squared error, which clips outliers.")
@click.option("--act-range", type=click.Choice(ACT_RANGE_MODES), default="ema", show_default=True,
              help="Ranges of static and folded activations: ema, minmax, or mse, of least squared error, which clips outliers.")
@click.option("--learned-scale", is_flag=True, help="With static activations: frozen scales go on learning.")
@click.option("--preset", "preset_name", metavar="NAME", shell_complete=complete_presets,
              help="Named settings, fitted to the network's image size, channels and classes  [default: the card's, or the data "
              "set's fast ones].")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE",
              help="TOML file of settings that differ from the preset's.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="One more setting; may be repeated.")
@help_config(_settings_text)
@click.option("--images", "images_file", type=click.Path(path_type=Path), metavar="FILE",
              help="images.safetensors of another run with memory_size: learn from these, without a generator.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", envvar="GRANQ_DATA", show_envvar=True,
              help="Folder with the test images; which training never sees; without it, only digits are evaluated.")
@click.option("--count", type=click.IntRange(min=1), metavar="N",
              help="With --data: evaluate on N of the test images, drawn with a fixed seed  [default: all].")
@click.option("--evaluate-every", type=click.IntRange(min=1), metavar="EPOCHS",
              help="With --data: evaluate that often  [default: at the end].")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in RUN_DIR, if there is one.")
@click.option("--device", default="cpu", show_default=True, help="torch device; under torchrun, cuda means each rank's own.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's].")
@click.option("--tensorboard", is_flag=True, help="Also write metrics for TensorBoard to RUN_DIR/tensorboard.")
def qat(name, out, weights, dataset, weight_bits, act_bits, activations, weight_regime, weight_range, act_range, learned_scale,
        preset_name, config_file, assignments, images_file, data, count, evaluate_every, resume, device, threads,
        tensorboard) -> None:
    """Train a low-bit network without data.

    A generator invents images, and the float network teaches.

    NAME is a float zoo entry, a card file PATH.toml, or module:function of your own.

    RUN_DIR gets config.toml, run.json, metrics.csv, checkpoint.pt, student.safetensors, images.png and curves.png. Under torchrun
    all ranks share the batch.

    \b
    Example:
      granq qat resnet20_cifar10 --weight-bits 3 --act-bits 3 --weights resnet20.pt --out runs/w3a3 --data DIR
    """
    with input_errors():
        from zoo.registry import card_of
        regime = weight_regime or ("per-output-channel-symmetric" if activations == "folded" else "per-output-channel")
        quantization = Quantization(weight_bits, act_bits, regime, activations, learned_scale, weight_range, act_range)
        card = card_of(name, dataset)
    if activations == "folded" and images_file is None:
        raise click.UsageError("--activations folded needs --images FILE, for ranges to fold: the images.safetensors that "
                               "an earlier granq qat of this network left in its RUN_DIR")
    for option, value in (("--count", count), ("--evaluate-every", evaluate_every)):
        if value and data is None and card.dataset != "digits":
            raise click.UsageError(f"{option} needs --data DIR")

    import torch
    from tqdm import tqdm

    import zoo.data
    from granq_plugin.zero_shot import parallel
    from zoo.qat import read_images, train_student
    from zoo.registry import teacher_of
    from zoo.weights import sha256

    with input_errors():
        config = _settings(card, preset_name, config_file, assignments)
        if threads:
            torch.set_num_threads(threads)
        device = open_device(join_ranks(device))
        teacher, teacher_sha256 = teacher_of(card, weights)
        images = None if images_file is None else read_images(images_file)
        has_test_set = data is not None or card.dataset in zoo.data.BUNDLED
        test_set = zoo.data.load_images(data, card.dataset, card=card) if has_test_set else None
        test_set = test_set.subset(count) if test_set and count else test_set
        writer = _tensorboard(out) if tensorboard and parallel.rank() == 0 else None

    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (card.preprocessing.mean, card.preprocessing.std))
    normalization = f"mean {mean}, std {std}"

    def on_float_top1(top1: float) -> None:
        bar.write(f"float {card.name}: top-1 {top1:.2f} % ({len(test_set)} test images, normalized with {normalization})",
                  file=sys.stderr)

    def on_epoch(row: dict) -> None:
        words = [f"epoch {row['epoch']}/{config.epochs}", *(
            f"{k} {row[k]:.4g}" for k in ("loss_generator", "loss_bn", "loss_student") if k in row),
            f"agreement {row['agreement']:.1%}"] + ([f"accuracy {row['accuracy']:.2f} %"] if "accuracy" in row else [])
        bar.write("  ".join(words), file=sys.stderr)
        for key, value in row.items() if writer else ():
            writer.add_scalar(key, value, row["iterations"])

    def on_iteration(done: int, log: dict) -> None:
        advance(bar, done)
        if done % 10 == 0:
            bar.set_postfix_str(f"{bar.format_dict['rate'] * config.batch_size if bar.format_dict['rate'] else 0:.0f} img/s, "
                                f"agreement {float(log['agreement']):.0%}", refresh=False)

    with tqdm(total=config.total_iterations, unit="it", disable=parallel.rank() > 0 or None) as bar, input_errors():
        if test_set is None and parallel.rank() == 0:
            bar.write(f"{card.name}: takes images normalized with {normalization}; its accuracy is not known without --data",
                      file=sys.stderr)
        if resume and parallel.rank() == 0:
            words = "goes on from the last checkpoint" if (out / "checkpoint.pt").is_file() else "no checkpoint: from the beginning"
            bar.write(f"{out}: {words}", file=sys.stderr)
        run = train_student(
            card, quantization, teacher, config, out, teacher_sha256=teacher_sha256, images=images,
            images_sha256=None if images_file is None else sha256(images_file), test_set=test_set, evaluate_every=evaluate_every,
            resume=resume, device=device, on_iteration=on_iteration, on_epoch=on_epoch, on_float_top1=on_float_top1)
    if parallel.rank() > 0:
        return
    click.echo(f"{name}, W{weight_bits}A{act_bits}, {regime} weights, {activations} activations, zero-shot QAT: "
               f"agreement with the teacher on its images {run.metrics[-1]['agreement']:.1%}")
    if test_set:
        click.echo(f"  float     top-1 {run.summary['float_top1']:6.2f} % ({len(test_set)} test images)\n"
                   f"  quantized top-1 {run.summary['top1']:6.2f} % (last epoch)")
    click.echo(f"  {out}/student.safetensors")


def _settings(card, preset_name: str | None, config_file: Path | None, assignments: tuple[str, ...]):
    """Preset, fitted to the card, then file, then single settings; classes and channels must match the card's."""
    from granq_plugin.zero_shot import PRESETS, preset
    images = card.preprocessing
    fast = f"{card.dataset}_fast"
    if fast not in PRESETS:  # a data set of the user's own
        fast = "cifar10_fast" if images.image_size < 64 else "imagenet_resnet18"
    config = preset(preset_name or card.preset or fast, num_classes=card.num_classes, image_size=images.image_size,
                    image_channels=images.channels)
    config = settings_from(config, config_file, assignments)
    for setting, has in (("num_classes", card.num_classes), ("image_channels", images.channels)):
        if getattr(config, setting) != has:
            raise ValueError(f"{setting} is set to {getattr(config, setting)}, {card.name} has {has}")
    return config


def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ValueError("--tensorboard needs the tensorboard package: pip install 'granq-plugin[tensorboard]'") from e
    return SummaryWriter(out / "tensorboard")
