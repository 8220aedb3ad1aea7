"""Does FINN take an exported network? Streamlines, maps, partitions and estimates it with FINN+, without Vivado, and runs it.

    python -m benchmarks.finn_plus NETWORK.onnx... --control UNFOLDED.onnx...

Runs in an environment of its own, because FINN+ pins other versions; nothing of granq_plugin is needed there:

    python -m venv finn && finn/bin/pip install --no-deps finn-plus==1.6.1 onnx-passes==0.4.1
    finn/bin/pip install qonnx==1.0.0 onnx==1.21.0 numpy==2.4.6 onnxruntime==1.25.1 protobuf==5.29.6 bitstring==4.3 jinja2 psutil \\
        netron networkx PyYAML click "mashumaro[yaml]" pydantic rich pandas scipy termcolor onnxoptimizer mip==1.17.0 \\
        scikit-learn matplotlib tqdm torch

Networks are files of ``granq export --format finn``, controls QONNX files of the same networks with static scales that were not
folded; ``python -m benchmarks.export --finn-files DIR`` writes both. A network passes if streamlining leaves no per-channel
constant to multiply by or add before the last matrix product and only products of integers, the transposition of the input is the
only operator that is not mapped to hardware, one partition is made and its resources are estimated, and if numpy execution equals
the file's to 1e-5 of the largest output after every step. A control must fail. Exit code 1 otherwise. Writes
``benchmarks/results/finn_plus.csv`` and the table in docs/results.md.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import click
import numpy as np

from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "finn_plus: written by python -m benchmarks.finn_plus"
FIELDS = ("file", "control", "passed", "streamlined", "hardware_layers", "max_rel", "cycles", "luts", "bram18", "dsps", "seconds",
          "reason")
PART = "xczu7ev-ffvc1156-2-e"  # of the ZCU104 board
TOLERANCE = 1e-5


class Refused(Exception):
    """FINN cannot use the network, and why."""


def load_finn(folder: Path):
    """FINN+'s steps and their settings, without Vivado and its simulator."""
    sys.modules["finn.xsi"] = mock.MagicMock()
    os.environ |= dict(XILINX_VIVADO="/none/2024.2", FINN_BUILD_DIR=str(folder))
    import finn.util.settings
    finn.util.settings.initialize_dummy_settings()
    from finn.builder import build_dataflow_steps as steps
    from finn.builder.build_dataflow_config import DataflowBuildConfig, DataflowOutputType
    config = DataflowBuildConfig(
        output_dir=str(folder / "out"), synth_clk_period_ns=10.0, fpga_part=PART, standalone_thresholds=True, target_fps=100,
        generate_outputs=[DataflowOutputType.ESTIMATE_REPORTS])
    return steps, config


def execute(model, x: np.ndarray) -> np.ndarray:
    from qonnx.core.onnx_exec import execute_onnx
    return next(iter(execute_onnx(model, {model.graph.input[0].name: x}).values())).reshape(-1)


def streamline(model, steps, config):
    """QONNX to thresholds and integer products."""
    from finn.builder.custom_step_library.resnet import step_resnet_streamline, step_resnet_tidy
    from qonnx.custom_op.registry import getCustomOp
    model = steps.step_qonnx_to_finn(model, config)
    for node in model.get_nodes_by_op_type("MultiThreshold"):  # qonnx 1.0.0 leaves it open, and FINN then computes something else
        if len(model.get_tensor_shape(node.input[0])) == 4:
            getCustomOp(node).set_nodeattr("data_layout", "NCHW")
    return step_resnet_streamline(step_resnet_tidy(model, config), config)


def check_streamlined(model) -> None:
    """Integers alone up to the last matrix product."""
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    for node in products:
        types = [model.get_tensor_datatype(t).name for t in node.input]
        if "FLOAT32" in types:
            raise Refused(f"streamlining leaves {node.name} {' x '.join(types)}")
    for node in list(model.graph.node)[:list(model.graph.node).index(products[-1])]:
        constant = [t for t in node.input if model.get_initializer(t) is not None]
        if node.op_type in ("Mul", "Add", "Div", "Sub") and constant:
            shape = list(model.get_tensor_shape(constant[0]))
            if model.get_initializer(constant[0]).size > 1:  # a single number is 1 / pixels of a mean, or a signed integer's offset
                raise Refused(f"streamlining leaves a {node.op_type} of {shape} ({node.name})")


def map_to_hardware(model, steps, config):
    from finn.transformation.fpgadataflow.convert_to_hw.elementwise_binary_operation import InferElementwiseBinaryOperation
    from qonnx.transformation.general import GiveUniqueNodeNames
    from qonnx.transformation.infer_data_layouts import InferDataLayouts
    from qonnx.transformation.infer_datatypes import InferDataTypes
    model = steps.step_convert_to_hw(model, config)
    # once more: the division that a global pool leaves comes after FINN+'s own pass over such operations
    for transformation in (InferElementwiseBinaryOperation(), InferDataLayouts(), InferDataTypes(), GiveUniqueNodeNames()):
        model = model.transform(transformation)
    others = [n for n in model.graph.node if not n.domain.startswith("finn.custom_op.fpgadataflow")]
    outside = [n.name for n in others if not (n.op_type == "Transpose" and n.input[0] == model.graph.input[0].name)]
    if outside:
        raise Refused(f"not mapped to hardware: {', '.join(outside)}")
    return model


def estimate(model, steps, config) -> dict:
    for name in ("create_dataflow_partition", "specialize_layers", "target_fps_parallelization", "apply_folding_config",
                 "minimize_bit_width", "transpose_decomposition", "generate_estimate_reports"):
        model = getattr(steps, f"step_{name}")(model, config)
    folder = config.get_report_directory()
    resources = json.loads((folder / "estimate_layer_resources.json").read_text())["total"]
    cycles = json.loads((folder / "estimate_network_performance.json").read_text())["max_cycles"]
    return dict(cycles=int(cycles), luts=round(resources["LUT"]), bram18=round(resources["BRAM_18K"]), dsps=round(resources["DSP"]))


def row_of(path: Path, control: bool) -> dict:
    """Take one file as far as FINN+ goes with it."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model
    row, started = dict(file=path.name, control=control, passed=False, streamlined=False, max_rel=0.0), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps, config = load_finn(Path(folder))
        model = cleanup_model(ModelWrapper(str(path)))
        x = np.random.default_rng(0).normal(size=model.get_tensor_shape(model.graph.input[0].name)).astype(np.float32)
        expected = execute(model, x)

        def compare(model) -> None:
            error = float(np.abs(execute(model, x) - expected).max() / np.abs(expected).max())
            row["max_rel"] = max(row["max_rel"], error)
            if error > TOLERANCE:
                raise Refused(f"computes something else: {error:.2g}")

        try:
            model = streamline(model, steps, config)
            check_streamlined(model)
            row["streamlined"] = True
            compare(model)
            model = map_to_hardware(model, steps, config)
            compare(model)
            row |= dict(hardware_layers=sum(n.domain.startswith("finn.") for n in model.graph.node))
            row |= estimate(model, steps, config) | dict(passed=True)
        except Refused as e:
            row["reason"] = str(e)
        except Exception as e:  # FINN's own errors, and whatever its transformations run into
            row["reason"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return row | dict(max_rel=f"{row['max_rel']:.2g}", seconds=round(time.perf_counter() - started))


def read_rows(path: Path = RESULTS / "finn_plus.csv") -> list[dict]:
    return read(path)


def table(rows: list[dict]) -> str:
    lines = ["| file | FINN+ 1.6.1 | hardware layers | difference | cycles | LUT | BRAM18 | DSP |",
             "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        if r["passed"] == "True":
            lines.append(f"| {r['file']} | streamlined, mapped, partitioned, estimated | {r['hardware_layers']} | {r['max_rel']} | "
                         f"{int(r['cycles']):,} | {int(r['luts']):,} | {r['bram18']} | {r['dsps']} |")
        else:
            label = "not folded (control): refused" if r["control"] == "True" else "REFUSED"
            lines.append(f"| {r['file']} | {label}: {r['reason']} | - | - | - | - | - | - |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--control", "controls", multiple=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(files, controls) -> None:
    results = []
    for path, control in [(f, False) for f in files] + [(c, True) for c in controls]:
        row = row_of(path, control)
        results.append(row["passed"] != control)
        click.echo(f"{path}: {'passed' if row['passed'] else 'refused: ' + row['reason']} ({row['seconds']} s)")
        write(RESULTS / "finn_plus.csv", FIELDS, [r for r in read_rows() if r["file"] != path.name] + [row])
        replace_table(MARKER, table(read_rows()))
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
