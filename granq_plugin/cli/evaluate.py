"""``granq evaluate``."""

import json
from pathlib import Path

import click

from granq_plugin.cli.options import BitWidth, compile_option, complete_names, dataset_option, input_errors, open_device
from zoo.quantization import WEIGHT_REGIMES

__all__ = ["evaluate"]


@click.command()
@click.argument("name", shell_complete=complete_names(float_only=True))
@click.option("--weight-bits", type=BitWidth(), default=4, show_default=True, help="Bit width of the weights, 1 to 16.")
@click.option("--act-bits", type=BitWidth(), default=4, show_default=True, help="Bit width of the activations, 1 to 16.")
@click.option("--weight-regime", type=click.Choice(list(WEIGHT_REGIMES)), default="per-output-channel", show_default=True,
              help="Granularity of the weights; per-kernel is for comparison with the paper only.")
@click.option("--static", is_flag=True, help="Frozen per-channel activation ranges, collected from --calibration-data.")
@click.option("--calibration-data", type=click.Path(path_type=Path), metavar="FILE",
              help=".npz file with images x (uint8 [N, H, W, 3]) and y for --static; labels are not used.")
@click.option("--calibration-images", type=click.IntRange(min=1), default=1000, show_default=True,
              help="How many of them, drawn with a fixed seed.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", envvar="GRANQ_DATA", show_envvar=True,
              help="Folder with the test images: DATASET/test.npz, or torchvision's folders; the digits need none.")
@click.option("--count", type=click.IntRange(min=1), metavar="N",
              help="Evaluate on N of the test images, drawn with a fixed seed  [default: all].")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE",
              help="Float weights: .safetensors or a torch state dict  [default: those that the zoo ships].")
@dataset_option
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="torch device, e.g. cuda.")
@compile_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's].")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Also write the result there.")
def evaluate(name, weight_bits, act_bits, weight_regime, static, calibration_data, calibration_images, data, count, weights,
             dataset, batch_size, device, compile, threads, json_path) -> None:
    """Quantize a network without training, and evaluate it.

    Prints its top-1 accuracy beside the float one's.

    NAME is a float zoo entry, a card file PATH.toml, or module:function of your own.

    \b
    Example:
      granq evaluate resnet20_cifar10 --weight-bits 4 --act-bits 4 --data DIR --weights resnet20.pt
    """
    with input_errors():
        from zoo.registry import card_of
        card = card_of(name, dataset)
    if static != (calibration_data is not None):
        raise click.UsageError("--static and --calibration-data FILE belong together: give both or neither")
    if json_path is not None and (json_path.is_dir() or not json_path.absolute().parent.is_dir()):
        raise click.UsageError(f"--json {str(json_path)!r}: " + (
            "is a folder" if json_path.is_dir() else "its folder does not exist"))

    import torch
    from tqdm import tqdm

    import granq_plugin
    import zoo.data
    import zoo.evaluate
    import zoo.weights
    from granq_plugin.atomic import write_text
    from zoo.registry import teacher_of

    with input_errors():
        device = open_device(device)
        zoo.evaluate.check_compile(compile, device)
        if threads:
            torch.set_num_threads(threads)
        test_set = zoo.data.load_images(data, card.dataset, card=card)
        test_set = test_set.subset(count) if count else test_set
        model, weights_sha256 = teacher_of(card, weights)
        quantized = granq_plugin.quantize(
            model, weight_bits, act_bits, weight_quant=getattr(granq_plugin, WEIGHT_REGIMES[weight_regime]))
        if static:
            chosen = zoo.data.read_npz(calibration_data).subset(calibration_images)
            batches = zoo.evaluate.input_batches(chosen.images, card.preprocessing, batch_size)
            quantized = granq_plugin.to_static(quantized, batches)

        results = {}
        for label, network in (("float", model), ("quantized", quantized)):
            with tqdm(total=len(test_set), desc=f"{label:9}", unit="img", disable=None) as bar:
                results[label] = zoo.evaluate.evaluate(
                    network, test_set, card.preprocessing, batch_size, device, progress=bar.update, compile=compile)

    activations = "static" if static else "dynamic"
    click.echo(f"{name} on {card.dataset} ({len(test_set)} test images), W{weight_bits}A{act_bits}, "
               f"{weight_regime} weights, {activations} activations, no training")
    for label, accuracy in results.items():
        click.echo(f"  {label:9} top-1 {accuracy.top1:6.2f} %   {accuracy.images_per_second:7.0f} images/s")
    if json_path is not None:
        report = dict(
            network=name, dataset=card.dataset, images=len(test_set), weight_bit_width=weight_bits, act_bit_width=act_bits,
            weight_regime=weight_regime, activations=activations,
            calibration_images=len(chosen) if static else None,
            calibration_data_sha256=zoo.weights.sha256(calibration_data) if static else None,
            weights_sha256=weights_sha256,
            float_top1=results["float"].top1, float_top5=results["float"].top5,
            quantized_top1=results["quantized"].top1, quantized_top5=results["quantized"].top5,
            float_images_per_second=results["float"].images_per_second,
            quantized_images_per_second=results["quantized"].images_per_second,
            version=granq_plugin.__version__, torch=torch.__version__)
        with input_errors():
            write_text(json_path, json.dumps(report, indent=2) + "\n")
