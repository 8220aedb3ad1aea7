"""Programs that run an exported file: onnxruntime, qonnx's executor, and hls4ml's compiled C simulation."""

import contextlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Callable

import numpy as np

from granq_plugin.export.files import attribute, constants_of, quant_limits
from granq_plugin.reading import reason_of

__all__ = ["EXECUTORS", "fixed_batch", "lower_quant", "open_executor", "split_for_hls4ml", "with_input_shapes"]

EXECUTORS = ("onnxruntime", "qonnx", "hls4ml")


def open_executor(name: str, model) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Make an ``onnx.ModelProto`` runnable.

    Args:
        name: one of ``EXECUTORS``. model: an ``onnx.ModelProto``; it is not changed.

    Returns:
        A function from a dict of inputs to a dict of outputs, by name.

    Raises:
        ValueError: for an unknown executor, or a model that it does not take. ModuleNotFoundError: if it is not installed.
    """
    if name not in EXECUTORS:
        raise ValueError(f"unknown executor {name!r}; known: {', '.join(EXECUTORS)}")
    return {"onnxruntime": _onnxruntime, "qonnx": _qonnx, "hls4ml": _hls4ml}[name](model)


def fixed_batch(model) -> int | None:
    """The batch size that a model is fixed to, or None."""
    shape = model.graph.input[0].type.tensor_type.shape.dim
    return shape[0].dim_value or None if len(shape) else None


def _onnxruntime(model):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    # fused kernels round differently; what is verified is the graph as it stands
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            lower_quant(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's own classes
        raise ValueError(f"onnxruntime does not take this model: {reason_of(e)}") from e
    names = [o.name for o in session.get_outputs()]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, inputs)))
        except Exception as e:
            raise ValueError(f"onnxruntime cannot run this model: {reason_of(e)}") from e

    return run


def _qonnx(model):
    """qonnx needs the shape of every tensor, so the batch size is written into a copy of the model when it is known."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes
    prepared = {}

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch = len(next(iter(inputs.values())))
        try:
            if batch not in prepared:
                wrapper = ModelWrapper(with_input_shapes(model, {name: x.shape for name, x in inputs.items()}))
                prepared[batch] = wrapper.transform(InferShapes())
            with warnings.catch_warnings():  # of tensors whose shapes the file does not tell, which qonnx takes for 0
                warnings.filterwarnings("ignore", "Output shapes disagree")
                return execute_onnx(prepared[batch], inputs)
        except Exception as e:  # assertions, KeyErrors, onnxruntime's own classes
            raise ValueError(f"qonnx cannot run this model: {type(e).__name__}: {reason_of(e)}") from e

    return run


def with_input_shapes(model, shapes: dict):
    """A copy of the model whose inputs have these shapes (by name), and no other tensor has any."""
    import onnx
    from onnx import helper
    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    del shaped.graph.value_info[:]
    for tensor in shaped.graph.input:
        tensor.CopyFrom(helper.make_tensor_value_info(
            tensor.name, tensor.type.tensor_type.elem_type, shapes[tensor.name]))
    for tensor in shaped.graph.output:
        tensor.type.tensor_type.ClearField("shape")
    return shaped


_HLS4ML_LIMITS = ("GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Gemm", "MatMul")


def split_for_hls4ml(model):
    """Cut a network where hls4ml 1.3 stops: it gets global pooling wrong, and refuses a flattening and the linear layer behind it.

    Returns:
        ``(body, head)``, two ``onnx.ModelProto``; head is None for a network that has none of these.

    Raises:
        ValueError: if nothing is left for hls4ml.
    """
    import onnx
    from onnx import TensorProto, helper
    cut = next((n for n in model.graph.node if n.op_type in _HLS4ML_LIMITS), None)
    if cut is None:
        return model, None
    if cut.input[0] == model.graph.input[0].name or not any(n.op_type == "Conv" for n in model.graph.node):
        raise ValueError(f"hls4ml does not take this model: no convolution stands before its {cut.op_type}")
    named = onnx.ModelProto()
    named.CopyFrom(model)
    del named.graph.value_info[:], named.graph.quantization_annotation[:]
    named.graph.value_info.append(helper.make_tensor_value_info(cut.input[0], TensorProto.FLOAT, None))
    extractor = onnx.utils.Extractor(named)
    names = [[model.graph.input[0].name], [cut.input[0]], [model.graph.output[0].name]]
    return extractor.extract_model(names[0], names[1]), extractor.extract_model(names[1], names[2])


def _hls4ml(model):
    """Compile the firmware that hls4ml writes for a folded network with g++, and run it on the CPU. Channels last inside.

    What :func:`split_for_hls4ml` cuts off is run in onnxruntime; what it is given there is an output of the function too.
    """
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.util.cleanup import cleanup_model
    if shutil.which("g++") is None:
        raise ValueError("hls4ml's simulation is compiled with g++, which is not installed here")
    body, head = split_for_hls4ml(model)
    rest = None if head is None else _onnxruntime(head)
    input_name, output_name = model.graph.input[0].name, model.graph.output[0].name
    shape = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    wrapper = cleanup_model(ModelWrapper(with_input_shapes(body, {input_name: [1, *shape[1:]]})).transform(InferShapes()))
    channels, *space = wrapper.get_tensor_shape(wrapper.graph.output[0].name)[1:]
    wrapper = cleanup_model(wrapper.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True)))
    folder, printed = tempfile.TemporaryDirectory(prefix="granq_hls4ml_"), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):  # every layer, and what the compiler says
            config = hls4ml.utils.config_from_onnx_model(
                wrapper, granularity="name", backend="Vitis", default_precision="fixed<48,16>")
            firmware = hls4ml.converters.convert_from_onnx_model(
                wrapper, output_dir=folder.name, io_type="io_stream", backend="Vitis", hls_config=config)
            firmware.compile()
    except Exception as e:  # anything: assertions, KeyErrors, the compiler's messages
        folder.cleanup()
        said = " / ".join(filter(None, map(str.strip, printed.getvalue().splitlines()[-5:])))
        raise ValueError(f"hls4ml does not take this model: {type(e).__name__}: {reason_of(e)}; it printed: {said}") from e

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x = np.ascontiguousarray(inputs[input_name].transpose(0, 2, 3, 1))
        y = np.asarray(firmware.predict(x)).reshape(len(x), channels, *space)
        if rest is None:
            return {output_name: y}
        outputs = [rest({body.graph.output[0].name: sample[None]})[output_name] for sample in y]
        return {output_name: np.concatenate(outputs), body.graph.output[0].name: y}

    run.folder = folder  # the library is loaded from it: it lives as long as the function
    return run


def lower_quant(model):
    """A copy of an ``onnx.ModelProto`` in standard operators: every Quant node becomes Div, Add, Clip, Round, Sub, Mul.

    These are the operators that QONNX defines Quant by, for any bit width and zero point. (qonnx's own QuantToQCDQ takes
    2 to 8 bits and the zero point 0.)

    Raises:
        ValueError: for a Quant node whose bit width is computed, or a rounding mode other than ROUND.
    """
    import onnx
    from onnx import helper, numpy_helper
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    if not any(n.op_type == "Quant" for n in model.graph.node):
        return lowered
    constants = constants_of(model)
    nodes = []
    for i, node in enumerate(model.graph.node):
        if node.op_type != "Quant":
            nodes.append(node)
            continue
        mode = attribute(node, "rounding_mode", b"ROUND").decode().upper()
        if mode not in ("ROUND", "HALF_EVEN"):
            raise ValueError(f"Quant node {node.name!r} rounds with {mode}; only ROUND is known here")
        if node.input[3] not in constants:
            raise ValueError(f"Quant node {node.name!r} has a computed bit width")
        limits = quant_limits(node, int(constants[node.input[3]]))
        x, scale, zero_point = node.input[:3]
        steps = [f"granq_quant_{i}_{step}" for step in range(5)]
        for limit, value in zip(("min", "max"), limits):
            lowered.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), f"granq_quant_{i}_{limit}"))
        nodes += [
            helper.make_node("Div", [x, scale], steps[:1]),
            helper.make_node("Add", [steps[0], zero_point], steps[1:2]),
            helper.make_node("Clip", [steps[1], f"granq_quant_{i}_min", f"granq_quant_{i}_max"], steps[2:3]),
            helper.make_node("Round", steps[2:3], steps[3:4]),
            helper.make_node("Sub", [steps[3], zero_point], steps[4:5]),
            helper.make_node("Mul", [steps[4], scale], [node.output[0]])]
    del lowered.graph.node[:]
    lowered.graph.node.extend(nodes)
    return lowered

