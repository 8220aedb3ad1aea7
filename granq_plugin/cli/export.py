"""``granq export``, ``verify``, ``report`` and ``ranges``: files for other tools, and what they hold."""

from pathlib import Path

import click

from granq_plugin.cli.options import complete_names, input_errors

__all__ = ["export", "ranges", "report", "verify"]

FORMATS = ("qonnx", "qcdq", "finn")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--format", "file_format", type=click.Choice(FORMATS), required=True,
              help="qonnx: Quant nodes. qcdq: standard operators, for onnxruntime. finn: QONNX of a folded network, checked.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", required=True, help="The ONNX file.")
@click.option("--top-k", type=click.IntRange(min=1), help="finn: end in the indices of the k largest outputs.")
@click.option("--dynamo", is_flag=True, help="qonnx, qcdq: torch's dynamo exporter instead of the older one.")
def export(run_dir, file_format, out, top_k, dynamo) -> None:
    """Write the network of RUN_DIR as an ONNX file.

    RUN_DIR is of granq qat. Other tools read the file, and compute what torch does.

    \b
    Example:
      granq export runs/w4a4 --format qcdq --out w4a4.onnx
    """
    if top_k and file_format != "finn":
        raise click.UsageError("--top-k needs --format finn")
    if dynamo and file_format == "finn":
        raise click.UsageError("--dynamo: FINN maps only what the older exporter writes")
    with input_errors():
        from granq_plugin.deploy import export_finn
        from granq_plugin.export import export_qcdq, export_qonnx
        from zoo.students import load_run
        student, network, run = load_run(run_dir)
        activations = student.quantization.activations
        if file_format == "finn" and activations != "folded":
            images = run_dir if (run_dir / "images.safetensors").is_file() else "RUN_WITH_MEMORY"
            weights = "" if student.card.weights else " --weights FILE"
            bits = student.quantization.weight_bit_width, student.quantization.act_bit_width
            raise ValueError(
                f"--format finn needs a run with folded activations, those of {str(run_dir)!r} are {activations}; train one: "
                f"granq qat {student.network} --activations folded --images {images}/images.safetensors{weights} "
                f"--weight-bits {bits[0]} --act-bits {bits[1]} --out NEW_RUN")
        known = ("network", "teacher_weights_sha256", "float_top1", "top1", "test_images")
        metadata = {key: run[key] for key in known if key in run}
        example = student.example_input()
        if file_format == "finn":
            export_finn(network, example, out, top_k=top_k, metadata=metadata)
        else:
            (export_qonnx if file_format == "qonnx" else export_qcdq)(network, example, out, metadata=metadata, dynamo=dynamo)
    click.echo(f"{out}: {student.network}, {student.quantization.bits}, {activations} activations, "
               f"{file_format}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", "run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR", required=True,
              help="The run of granq qat that FILE was exported from.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", envvar="GRANQ_DATA", show_envvar=True,
              help="Folder with the test images; the digits need none.")
@click.option("--count", type=click.IntRange(min=1), default=1000, show_default=True,
              help="How many of them, drawn with a fixed seed.")
@click.option("--images", "images_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Instead of --data: images.safetensors of a run with memory_size, which need no data.")
@click.option("--executor", "executors", type=click.Choice(["onnxruntime", "qonnx", "hls4ml"]), multiple=True,
              default=("onnxruntime", "qonnx"), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch [default: torch's].")
def verify(file, run_dir, data, count, images_file, executors, batch_size, threads) -> None:
    """Compare an exported FILE with its torch network.

    Both run on the same images; the exit code is 1 unless they agree. They agree if every activation's integers are equal, each
    layer given torch's activations, but for those that lie so near to a rounding tie that float32 sums in another order explain
    them; and the outputs within 1e-5. hls4ml (extra hls; files of --format finn; compiled with g++) has no such view: there every
    image's top-1 must be the same.

    \b
    Example:
      granq verify w4a4.onnx --model runs/w4a4 --data DIR
      granq verify w4a4.onnx --model runs/w4a4 --images runs/w4a4/images.safetensors
      granq verify finn.onnx --model runs/folded --data DIR --executor hls4ml --count 100
    """
    import torch
    from tqdm import tqdm
    with input_errors():
        import zoo.data
        from granq_plugin.export import verify as verify_file
        from granq_plugin.export.files import read_onnx
        from zoo.evaluate import input_batches
        from zoo.image_folder import fixed_order
        from zoo.qat import read_images
        from zoo.students import load_run
        if threads:
            torch.set_num_threads(threads)
        read_onnx(file)  # a damaged file is told before work starts
        student, network, _ = load_run(run_dir)
        if images_file is not None:
            images, labels = read_images(images_file), None
            images = images[fixed_order(len(images))[:count]].float()
        else:
            chosen = zoo.data.load_images(data, student.card.dataset, card=student.card).subset(count)
            images, labels = torch.cat(list(input_batches(chosen.images, student.card.preprocessing, 1000))), chosen.labels
        with tqdm(total=len(images) * len(executors), unit="img", disable=None) as bar:
            result = verify_file(file, network, images, labels=labels, executors=executors, batch_size=batch_size,
                                 progress=bar.update)
    click.echo(str(result))
    click.echo(f"{file}: verified" if result.agrees else f"{file}: NOT verified; was it exported from {run_dir}?")
    return 0 if result.agrees else 1


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def report(file) -> None:
    """Print operations and memory of an exported FILE.

    Multiply-accumulates, bit operations and bytes, per layer and in total, beside 8-bit and float.

    \b
    Example:
      granq report w4a4.onnx
    """
    with input_errors():
        from granq_plugin.export import report as report_of
        click.echo(str(report_of(file)))


@click.command()
@click.argument("source", metavar="NAME|RUN_DIR", shell_complete=complete_names())
@click.option("--out", type=click.Path(path_type=Path), metavar="PNG", required=True, help="The picture.")
def ranges(source, out) -> None:
    """Draw the activation scale of every channel.

    Of a network with static ranges, or before and after folding. NAME is a zoo entry, RUN_DIR a run of granq qat, with static or
    folded activations. Dynamic ranges are every image's own.

    \b
    Example:
      granq ranges resnet20_cifar10.granq_w4a4_folded --out ranges.png
      granq ranges runs/folded --out ranges.png
    """
    with input_errors():
        from granq_plugin.export import plot_ranges
        from zoo.students import static_and_folded
        plot_ranges(*static_and_folded(source), out)
    click.echo(f"{out}: activation scales of {source}")
