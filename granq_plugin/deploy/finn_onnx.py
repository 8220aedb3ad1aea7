"""Reading a QONNX graph for :func:`granq_plugin.deploy.check_finn`."""

import os

import numpy as np

from granq_plugin.deploy.finn import Op, Quant
from granq_plugin.export.files import constants_of, load_onnx

__all__ = ["read_onnx"]

_KINDS = {
    "Relu": "relu", "MaxPool": "max_pool", "GlobalAveragePool": "global_pool", "AveragePool": "average_pool", "ReduceMean": "mean",
    "Concat": "concat", "BatchNormalization": "norm", "Flatten": "shape", "Reshape": "shape", "Identity": "shape",
    "Dropout": "shape", "Squeeze": "shape", "Unsqueeze": "shape", "TopK": "shape"}  # yapf: disable
_AFFINE = {"Add": "norm", "Sub": "norm", "Mul": "multiply", "Div": "multiply"}
_CONVOLUTION_ATTRIBUTES = ("kernel_shape", "strides", "pads", "group")


def read_onnx(model) -> list[Op]:
    """The network's nodes in order of execution.

    Args:
        model: ModelProto, or the path of a file.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see :func:`~granq_plugin.export.files.load_onnx`.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_onnx(model)
    return _Reader(model).read()


class _Reader:

    def __init__(self, model) -> None:
        self.graph, self.constants = model.graph, constants_of(model)
        self.weights: dict[str, Quant] = {}  # tensor name -> quantizer of a constant
        self.ops: dict[str, Op] = {}  # tensor name -> the node that gives it

    def read(self) -> list[Op]:
        read = []
        for value in self.graph.input:
            if value.name not in self.constants:
                self.ops[value.name] = Op(value.name, "input", "input", [])
                read.append(self.ops[value.name])
        for node in self.graph.node:
            op = self._node(node)
            if op is not None:
                read.append(op)
                self.ops |= dict.fromkeys(node.output, op)
        read += [Op(v.name, "output", "output", [self.ops[v.name]]) for v in self.graph.output if v.name in self.ops]
        return read

    def _attributes(self, node) -> dict:
        from onnx import helper
        return {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def _node(self, node) -> Op | None:
        attributes = self._attributes(node)
        inputs = [self.ops[i] for i in node.input if i in self.ops]
        name, kind = node.name or node.output[0], node.op_type
        if node.op_type == "Constant":
            return None
        if node.op_type in ("Quant", "IntQuant", "BipolarQuant"):
            quant = self._quant(node, attributes)
            if inputs:
                return Op(name, "quant", kind, inputs[:1], quant=quant)
            self.weights[node.output[0]] = quant
            return None
        if not inputs:  # arithmetic on constants
            self._follow_weight(node, attributes)
            return None
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return self._layer(node, name, attributes, inputs)
        if node.op_type in _AFFINE:
            if len(inputs) == 1:
                others = [self.constants.get(i) for i in node.input if i not in self.ops]
                return Op(name, _AFFINE[kind], kind, inputs, per_channel=any(c is None or c.size > 1 for c in others))
            return Op(name, "add" if kind in ("Add", "Sub") else "other", kind, inputs)
        if node.op_type == "Pad":
            pads = self.constants.get(node.input[1]) if len(node.input) > 1 else np.asarray(attributes.get("pads", ()))
            on_channels = pads is not None and pads.size >= 4 and (pads[1] or pads[pads.size // 2 + 1])
            return Op(name, "channel_pad" if on_channels else "other", kind, inputs)
        if kind == "Transpose":  # to channels last: of the input only
            before = inputs[0]
            while before.kind in ("shape", "quant") and before.inputs:
                before = before.inputs[0]
            return Op(name, "shape" if before.kind == "input" else "other", kind, inputs)
        return Op(name, _KINDS.get(kind, "other"), kind, inputs)

    def _quant(self, node, attributes: dict) -> Quant:
        if node.op_type == "BipolarQuant":
            return Quant(1.0, True, True, "ROUND", self.constants.get(node.input[1]), np.zeros(()))
        _, scale, zero_point, bits = node.input[:4]
        bits, mode = self.constants.get(bits), attributes.get("rounding_mode", b"ROUND")
        return Quant(
            float(bits.item()) if bits is not None and bits.size == 1 else None, bool(attributes.get("signed", 1)),
            bool(attributes.get("narrow", 1)), mode.decode() if isinstance(mode, bytes) else mode, self.constants.get(scale),
            self.constants.get(zero_point))

    def _follow_weight(self, node, attributes: dict) -> None:
        """Quantized weights stay so through a transposition; of other arithmetic on constants only the fact is kept."""
        quant = self.weights.get(node.input[0]) if node.input else None
        if quant is None or node.op_type not in ("Transpose", "Identity"):
            return
        if node.op_type == "Transpose" and quant.scale is not None and quant.scale.ndim > 1:
            scale = quant.scale.transpose(attributes.get("perm", tuple(range(quant.scale.ndim))[::-1]))
            quant = Quant(quant.bits, quant.signed, quant.narrow, quant.rounding, scale, quant.zero_point)
        self.weights[node.output[0]] = quant

    def _layer(self, node, name: str, attributes: dict, inputs: list[Op]) -> Op:
        if node.input[1] in self.ops or node.input[0] not in self.ops:
            return Op(name, "other", f"{node.op_type} of two activations" if len(inputs) > 1 else node.op_type, inputs)
        missing, axis = (), 0
        if node.op_type in ("Conv", "ConvTranspose"):
            missing = tuple(a for a in _CONVOLUTION_ATTRIBUTES if a not in attributes)
            axis = int(node.op_type == "ConvTranspose")
        elif node.op_type == "Gemm":
            axis = 0 if attributes.get("transB", 0) else 1
        else:
            axis = 1
        weight = self.weights.get(node.input[1])
        return Op(name, "layer", node.op_type, inputs[:1], weight=weight, channel_axis=axis, missing=missing)
