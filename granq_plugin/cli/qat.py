"""``granq qat``."""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from granq_plugin.cli.options import BitWidth, input_errors, open_device
from zoo.students import ACTIVATIONS, WEIGHT_REGIMES, Student, calibrator

__all__ = ["qat"]


def _help_of_settings(context: click.Context, _, value: bool) -> None:
    if value and not context.resilient_parsing:
        from granq_plugin.zero_shot import PRESETS, ZeroShotConfig
        click.echo(f"presets: {', '.join(PRESETS)}\n\n{ZeroShotConfig().to_toml()}", nl=False)
        context.exit()


@click.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), metavar="RUN_DIR", required=True,
              help="Folder for everything that the run leaves; a new one, or with --resume that of the same run.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", required=True,
              help="The float teacher's weights: .safetensors or a torch state dict.")
@click.option("--weight-bits", type=BitWidth(), default=4, show_default=True, help="Bit width of the weights, 1 to 16.")
@click.option("--act-bits", type=BitWidth(), default=4, show_default=True, help="Bit width of the activations, 1 to 16.")
@click.option("--activations", type=click.Choice(ACTIVATIONS), default="dynamic", show_default=True,
              help="dynamic: the paper's. static: ranges follow the student, then freeze. folded: for FINN; needs --images.")
@click.option("--weight-regime", type=click.Choice(list(WEIGHT_REGIMES)),
              help="Granularity of the weights; per-kernel is for comparison with the paper only  [default: per-output-channel; "
              "with folded activations per-output-channel-symmetric].")
@click.option("--learned-scale", is_flag=True, help="With static activations: frozen scales go on learning.")
@click.option("--preset", "preset_name", metavar="NAME", help="Named settings  [default: the data set's fast ones].")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE",
              help="TOML file of settings that differ from the preset's.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="One more setting; may be repeated.")
@click.option("--help-config", is_flag=True, is_eager=True, expose_value=False, callback=_help_of_settings,
              help="Print presets and all settings, and exit.")
@click.option("--images", "images_file", type=click.Path(path_type=Path), metavar="FILE",
              help="images.safetensors of another run with memory_size: learn from these, without a generator.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", envvar="GRANQ_DATA", show_envvar=True,
              help="Folder with the test images; without it the student is not evaluated. Training never sees it.")
@click.option("--evaluate-every", type=click.IntRange(min=1), metavar="EPOCHS",
              help="With --data: evaluate that often  [default: at the end].")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in RUN_DIR, if there is one.")
@click.option("--device", default="cpu", show_default=True, help="torch device; under torchrun, cuda means each rank's own.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's].")
@click.option("--tensorboard", is_flag=True, help="Also write metrics for TensorBoard to RUN_DIR/tensorboard.")
def qat(name, out, weights, weight_bits, act_bits, activations, weight_regime, learned_scale, preset_name, config_file, assignments,
        images_file, data, evaluate_every, resume, device, threads, tensorboard) -> None:
    """Train a low-bit zoo network without data: a generator invents images, the float network teaches.

    RUN_DIR gets config.toml, run.json, metrics.csv, checkpoint.pt, student.safetensors, images.png and curves.png. Under torchrun
    all ranks share the batch.

    \b
    Example:
      granq qat resnet20_cifar10 --weight-bits 3 --act-bits 3 --weights resnet20.pt --out runs/w3a3 --data DIR
    """
    with input_errors():
        regime = weight_regime or ("per-output-channel-symmetric" if activations == "folded" else "per-output-channel")
        described = Student(name, weight_bits, act_bits, regime, activations, learned_scale)
        card = described.card
    if activations == "folded" and images_file is None:
        raise click.UsageError("--activations folded needs --images FILE, for ranges to fold: those of a run with memory_size")
    if evaluate_every and data is None:
        raise click.UsageError("--evaluate-every needs --data DIR")

    import torch
    from tqdm import tqdm

    import zoo.data
    import zoo.evaluate
    import zoo.weights
    from granq_plugin.zero_shot import parallel, zero_shot_qat
    from granq_plugin.zero_shot.outcome import save_outcome, save_tensors

    with input_errors():
        config = _settings(card, preset_name, config_file, assignments)
        if threads:
            torch.set_num_threads(threads)
        device = open_device(_join_ranks(device))
        teacher = card.build()
        zoo.weights.load_weights(teacher, weights)
        images = None if images_file is None else zoo.weights.read_state_dict(images_file).get("images")
        if images_file is not None and images is None:
            raise ValueError(f"{str(images_file)!r} holds no tensor 'images'")
        test_set = None if data is None else zoo.data.load_images(data, card.dataset)
        calibrated = {}  # a folded network is rebuilt from what it was folded from

        def calibrate(prepared):
            prepared = calibrator(images.float().split(250)[:8])(prepared)
            calibrated.update({k: v.clone() for k, v in prepared.state_dict().items() if isinstance(v, torch.Tensor)})
            return prepared
        student = described.build(teacher, calibrate)
        writer = _tensorboard(out) if tensorboard and parallel.rank() == 0 else None

    def top1(network) -> float:
        return zoo.evaluate.evaluate(described.deployed(network), test_set, card.preprocessing, device=device).top1

    def on_epoch(row: dict) -> None:
        words = [f"epoch {row['epoch']}/{config.epochs}", *(
            f"{k} {row[k]:.4g}" for k in ("loss_generator", "loss_bn", "loss_student") if k in row),
            f"agreement {row['agreement']:.1%}"] + ([f"accuracy {row['accuracy']:.2f} %"] if "accuracy" in row else [])
        bar.write("  ".join(words), file=sys.stderr)
        for key, value in row.items() if writer else ():
            writer.add_scalar(key, value, row["iterations"])

    def on_iteration(done: int, log: dict) -> None:
        if bar.n == 0:
            bar.initial = bar.n = done - 1  # a resumed run: images/s and time left count from here
        bar.update(1)
        if done % 10 == 0:
            bar.set_postfix_str(f"{bar.format_dict['rate'] * config.batch_size if bar.format_dict['rate'] else 0:.0f} img/s, "
                                f"agreement {float(log['agreement']):.0%}", refresh=False)

    with tqdm(total=config.total_iterations, unit="it", disable=parallel.rank() > 0) as bar, input_errors():
        result = zero_shot_qat(
            student.to(device), teacher.to(device), config, images=images, run_dir=out, resume=resume,
            evaluate=top1 if test_set else None, evaluate_every=evaluate_every or config.epochs, on_iteration=on_iteration,
            on_epoch=on_epoch)
    if parallel.rank() > 0:
        return
    summary = asdict(described) | dict(
        dataset=card.dataset, teacher_weights_sha256=zoo.weights.sha256(weights),
        images_sha256=None if images_file is None else zoo.weights.sha256(images_file))
    if test_set:
        summary |= dict(
            test_images=len(test_set), top1=result.metrics[-1]["accuracy"],
            float_top1=zoo.evaluate.evaluate(teacher, test_set, card.preprocessing, device=device).top1)
    with input_errors():
        if calibrated:
            save_tensors(out / "calibrated.safetensors", calibrated)
        save_outcome(out, replace(result, student=described.deployed(result.student)), summary, card.preprocessing.mean,
                     card.preprocessing.std)
    click.echo(f"{name}, W{weight_bits}A{act_bits}, {regime} weights, {activations} activations, zero-shot QAT: "
               f"agreement with the teacher on its images {result.metrics[-1]['agreement']:.1%}")
    if test_set:
        click.echo(f"  float     top-1 {summary['float_top1']:6.2f} % ({len(test_set)} test images)\n"
                   f"  quantized top-1 {summary['top1']:6.2f} % (last epoch)")
    click.echo(f"  {out}/student.safetensors")


def _settings(card, preset_name: str | None, config_file: Path | None, assignments: tuple[str, ...]):
    """Preset, then file, then single settings; the image size is the card's. Classes must match the card's."""
    from granq_plugin.zero_shot import ZeroShotConfig, preset
    config = preset(preset_name or f"{card.dataset}_fast")
    if config.num_classes != card.num_classes:
        raise ValueError(f"preset {preset_name!r} is for {config.num_classes} classes, {card.name} has {card.num_classes}")
    if config_file is not None:
        config = ZeroShotConfig.from_file(config_file, base=config)
    return ZeroShotConfig.from_toml("\n".join(map(_toml_line, assignments)), base=config)


def _toml_line(assignment: str) -> str:
    key, equals, value = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {assignment!r}")
    try:
        json.loads(value)  # numbers, true, false and lists are TOML too; anything else is a string
    except json.JSONDecodeError:
        value = json.dumps(value)
    return f"{key} = {value}"


def _join_ranks(device: str) -> str:
    """Under torchrun, join the process group; returns this rank's device."""
    import torch.distributed as dist
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        on_gpu = device.startswith("cuda")
        dist.init_process_group("nccl" if on_gpu else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ValueError("--tensorboard needs the tensorboard package: pip install 'granq-plugin[tensorboard]'") from e
    return SummaryWriter(out / "tensorboard")
