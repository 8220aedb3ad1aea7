"""Does an exported file compute what torch computes, on real images?

    python -m benchmarks.export --data DIR --weights FILE --calibration-data FILE

ResNet-20 (trained), and a depthwise, a concatenating and a fully connected network (random weights, batch statistics of the
calibration images): dynamic, static and folded, W4A4 and W3A3, as QONNX in qonnx's executor and onnxruntime and as QCDQ in
onnxruntime. Writes ``benchmarks/results/export.csv`` and the table in docs/results.md. Further parts, each with its own results:

``--ladder RUN_DIR`` (again for each run of ``granq qat``): ``export_ladder.csv``, the accuracy from float to the exported file on
the full test set, with how each was trained; ``--untrained-ladder``: the same of ResNet-20 without training. ``--hls4ml RUN_DIR``
(folded activations): ``hls4ml.csv``, the file of ``granq export --format finn`` in hls4ml's C simulation, compiled with g++, on 100
images. ``--finn-files DIR``: folded networks for :mod:`benchmarks.finn_plus`, and the same without folding. ``--networks ''``
leaves the first part out.
"""

import tempfile
from pathlib import Path

import click
import torch
from torch import nn

from benchmarks.export_ladder import LADDER_FIELDS, ladder_table, rungs_of_run, untrained_rungs
from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "export: written by python -m benchmarks.export"
KINDS = ("dynamic", "static", "folded")
BIT_WIDTHS = (4, 3)
FIELDS = ("network", "kind", "bits", "format", "executor", "images", "bit_equal", "close", "same_top1", "correct", "torch_correct",
          "max_rel", "quantizers", "integers", "unequal_integers", "largest_step", "tie_distance", "bound_used", "output_error")
HLS4ML_FIELDS = ("run", "bits", "images", "bit_equal", "close", "same_top1", "correct", "torch_correct", "max_rel", "integers",
                 "equal_integers")


class Depthwise(nn.Module):
    """As MobileNetV2: inverted residuals with depthwise convolutions and linear bottlenecks."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = self._layer(3, 16, 3, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(*self._layer(c, 4 * c, 1), *self._layer(4 * c, 4 * c, 3, stride, 4 * c),
                          nn.Conv2d(4 * c, o, 1, bias=False), nn.BatchNorm2d(o))
            for c, o, stride in ((16, 16, 1), (16, 24, 2), (24, 24, 1)))
        self.head, self.pool, self.flatten = self._layer(24, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(64, num_classes)

    @staticmethod
    def _layer(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out), nn.ReLU6())

    def forward(self, x):
        x = self.stem(x)
        x = x + self.blocks[0](x)
        x = self.blocks[1](x)
        x = x + self.blocks[2](x)
        return self.fc(self.flatten(self.pool(self.head(x))))


class Concat(nn.Module):
    """Two fire modules: squeeze, expand by 1x1 and 3x3 convolutions, concatenate."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU()
        self.squeeze1, self.left1, self.right1 = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.squeeze2, self.left2, self.right2 = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 24, 3, padding=1)
        self.relus, self.pool = nn.ModuleList(nn.ReLU() for _ in range(6)), nn.MaxPool2d(2)
        self.average, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, num_classes)

    def forward(self, x):
        x = self.relus[0](self.squeeze1(self.relu(self.stem(x))))
        x = self.pool(torch.cat([self.relus[1](self.left1(x)), self.relus[2](self.right1(x))], 1))
        x = self.relus[3](self.squeeze2(x))
        x = torch.cat([self.relus[4](self.left2(x)), self.relus[5](self.right2(x))], 1)
        return self.fc(self.flatten(self.average(x)))


def mlp(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, num_classes))


def untrained(build, images) -> nn.Module:
    """A network with fixed random weights and the batch statistics of real images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def quantized_as(kind: str, model: nn.Module, bits: int, calibration: list) -> nn.Module:
    """``model`` with dynamic, static or folded quantizers of ``bits`` bits; folded: cleared of rounding ties."""
    import granq_plugin as gq
    from granq_plugin.deploy import clear_ties, fold, prepare
    example = calibration[0][:1]
    if kind == "folded":
        return clear_ties(fold(gq.to_static(prepare(model, example, bits, bits), calibration), example), example)[0]
    network = gq.quantize(model, bits, bits, input_bit_width=8)
    return network if kind == "dynamic" else gq.to_static(network, calibration)


def rows_of(name: str, kind: str, bits: int, network: nn.Module, images, labels, batch_size: int, progress) -> list[dict]:
    """Export in both formats and verify."""
    from granq_plugin.export import export_qcdq, export_qonnx, verify
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for export, executors in ((export_qonnx, ("qonnx", "onnxruntime")), (export_qcdq, ("onnxruntime", ))):
            path = export(network, images[:1], Path(folder, "model.onnx"))
            result = verify(path, network, images, labels=labels, executors=executors, batch_size=batch_size, progress=progress)
            for a in result.agreements:
                i = a.integers
                rows.append(dict(zip(FIELDS, (
                    name, kind, bits, export.__name__.removeprefix("export_"), a.executor, a.images, a.exact, a.close, a.top1,
                    a.correct, a.torch_correct, f"{a.max_rel:.2g}", i.quantizers, i.values, i.unequal, i.largest_step,
                    f"{i.tie_distance:.2g}", f"{i.bound_used:.2g}", f"{i.output_error:.2g}"))))
    return rows


def hls4ml_row(run_dir: Path, test_set, count: int) -> dict:
    """The folded run's FINN file in hls4ml's compiled C simulation."""
    from granq_plugin.deploy import export_finn
    from granq_plugin.export import verify
    from zoo.evaluate import input_batches
    from zoo.students import load_run
    student, network, _ = load_run(run_dir)
    chosen = test_set.subset(count)
    images = torch.cat(list(input_batches(chosen.images, student.card.preprocessing, 1000)))
    with tempfile.TemporaryDirectory() as folder:
        path = export_finn(network, student.example_input(), Path(folder, "model.onnx"))
        a, = verify(path, network, images, labels=chosen.labels, executors=("hls4ml", )).agreements
    equal, integers = a.hls4ml_integers
    return dict(zip(HLS4ML_FIELDS, (
        run_dir.name, student.quantization.act_bit_width,
        a.images, a.exact, a.close, a.top1, a.correct, a.torch_correct, f"{a.max_rel:.2g}",
        integers, equal)))


def write_finn_files(models: dict[str, nn.Module], calibration: list, folder: Path, bits: int = 4) -> None:
    """Of every network, folded as FINN reads it, and with static scales per channel as the control that FINN gets stuck on."""
    import granq_plugin as gq
    from granq_plugin.deploy import export_finn, prepare
    from granq_plugin.export import export_qonnx
    folder.mkdir(parents=True, exist_ok=True)
    example = calibration[0][:1]
    for name, model in models.items():
        export_finn(quantized_as("folded", model, bits, calibration), example, folder / f"{name}_w{bits}a{bits}.onnx")
        static = gq.to_static(prepare(model, example, bits, bits), calibration)
        export_qonnx(static, example, folder / f"{name}_w{bits}a{bits}_unfolded.onnx", dynamic_batch=False)


def read_rows(path: Path, **replaced) -> list[dict]:
    """Rows of an earlier run, without those that have one of ``replaced``'s values in each of its columns."""
    return [r for r in read(path) if not replaced or not all(r[k] in values for k, values in replaced.items())]


def table(rows: list[dict], ladder_rows: list[dict], hls4ml_rows: list[dict]) -> str:
    """Markdown: a line per network, the worst of its formats and executors; then the ladder, then hls4ml."""
    lines = ["| network | activations | bits | images | within 1e-5 | same top-1 | unequal integers | farthest from a tie | "
             "of the bound |", "|---|---|---|---|---|---|---|---|---|"]
    for key in dict.fromkeys((r["network"], r["kind"], r["bits"]) for r in rows):
        of_key = [r for r in rows if (r["network"], r["kind"], r["bits"]) == key]
        close, top1 = (min(int(r[name]) for r in of_key) for name in ("close", "same_top1"))
        unequal = max(int(r["unequal_integers"]) for r in of_key)
        distance = max(float(r["tie_distance"]) for r in of_key)
        used = max((float(r["bound_used"]) for r in of_key if r["bound_used"]), default=None)
        lines.append(f"| {key[0]} | {key[1]} | W{key[2]}A{key[2]} | {of_key[0]['images']} | {close} | {top1} | {unequal} of "
                     f"{int(of_key[0]['integers']):,} | {f'{distance:.1g} steps' if unequal else '-'} | "
                     f"{f'{used:.0%}' if unequal and used is not None else '-'} |")
    lines += ladder_table(ladder_rows)
    for r in hls4ml_rows:
        lines += ["", f"hls4ml (C simulation compiled with g++; the pooled head in onnxruntime), folded run `{r['run']}`, "
                  f"W{r['bits']}A{r['bits']}, {r['images']} test images: {int(r['equal_integers']):,} of {int(r['integers']):,} "
                  f"integers that leave hls4ml equal; outputs of {r['bit_equal']} images bit-equal, of {r['close']} within 1e-5, "
                  f"{r['same_top1']} with the same top-1; correct: hls4ml {r['correct']}, torch {r['torch_correct']}."]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), envvar="GRANQ_DATA", required=True)
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--calibration-data", type=click.Path(path_type=Path), required=True)
@click.option("--images", "count", default=1000, show_default=True, help="Test images to verify on.")
@click.option("--batch-size", default=100, show_default=True)
@click.option("--networks", default="resnet20,depthwise,concat,mlp", show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--ladder", "ladder_runs", multiple=True, type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option("--untrained-ladder", is_flag=True)
@click.option("--hls4ml", "hls4ml_runs", multiple=True, type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option("--hls4ml-images", default=100, show_default=True)
@click.option("--finn-files", type=click.Path(path_type=Path), metavar="DIR")
def main(data, weights, calibration_data, count, batch_size, networks, kinds, ladder_runs, untrained_ladder, hls4ml_runs,
         hls4ml_images, finn_files) -> None:
    from tqdm import tqdm

    import zoo
    from zoo.data import load_images, read_npz
    from zoo.evaluate import input_batches
    from zoo.models.cifar_resnet import convolution_shortcuts
    from zoo.weights import load_weights
    card = zoo.get_card("resnet20_cifar10")
    test_set = load_images(data, card.dataset)
    calibration = list(input_batches(read_npz(calibration_data).subset(1000).images, card.preprocessing, 250))
    resnet20 = card.build()
    load_weights(resnet20, weights)
    resnet20 = convolution_shortcuts(resnet20)
    builders = dict(depthwise=Depthwise, concat=Concat, mlp=mlp)
    models = {n: resnet20 if n == "resnet20" else untrained(builders[n], calibration[0]) for n in networks.split(",") if n}
    chosen = test_set.subset(count)
    images = torch.cat(list(input_batches(chosen.images, card.preprocessing, 1000)))
    kinds = [k for k in kinds.split(",") if k]
    if finn_files:
        write_finn_files(models, calibration, finn_files)
        models = {}
    rows = read_rows(RESULTS / "export.csv", network=models, kind=kinds)
    with tqdm(total=len(models) * len(kinds) * len(BIT_WIDTHS) * 3 * len(images), unit="img") as bar:
        for name, model in models.items():
            for kind in kinds:
                for bits in BIT_WIDTHS:
                    network = quantized_as(kind, model, bits, calibration)
                    rows += rows_of(name, kind, bits, network, images, chosen.labels, batch_size, bar.update)
                    write(RESULTS / "export.csv", FIELDS, rows)
    if untrained_ladder:
        new = untrained_rungs(resnet20, calibration, test_set, card.preprocessing)
        write(RESULTS / "export_ladder.csv", LADDER_FIELDS, new + read_rows(RESULTS / "export_ladder.csv", training=["none"]))
    for run_dir in ladder_runs:  # a rung has one trained network
        new = rungs_of_run(run_dir, test_set, weights)
        places = {(r["network"], str(r["bits"]), r["rung"]) for r in new}
        known = [r for r in read_rows(RESULTS / "export_ladder.csv")
                 if r["training"] == "none" or (r["network"], r["bits"], r["rung"]) not in places]
        write(RESULTS / "export_ladder.csv", LADDER_FIELDS, known + new)
    for run_dir in hls4ml_runs:
        known = read_rows(RESULTS / "hls4ml.csv", run=[run_dir.name])
        write(RESULTS / "hls4ml.csv", HLS4ML_FIELDS, known + [hls4ml_row(run_dir, test_set, hls4ml_images)])
    replace_table(MARKER, table(*(read_rows(RESULTS / name) for name in ("export.csv", "export_ladder.csv", "hls4ml.csv"))))


if __name__ == "__main__":
    main()
