"""check_finn(): folded networks keep every rule; what breaks one is named, for torch models and for QONNX graphs alike."""

import subprocess
import sys

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brevitas.quant import Int8ActPerTensorFixedPoint, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from torch import nn

from granq_plugin import (
    GranQWeightPerChannel,
    GranQWeightPerChannelSymmetric,
    GranQWeightPerKernel,
    quantize,
    to_static,
)
from granq_plugin.deploy import bake, check_finn, fold, prepare
from granq_plugin.deploy.finn import RULES
from networks import FOLDABLE, images64, randomized
from zoo.models.cifar_resnet import convolution_shortcuts, resnet20

READY = ("without_norm", "mobile", "residual", "mlp")


def ready(name="residual", trainable=False, **options):
    static = to_static(prepare(randomized(FOLDABLE[name](), 0), images64(0, 1), **options), [images64(1, 8)])
    return fold(static, images64(0, 1), trainable=trainable)


def broken(model):
    """Rule -> nodes that break it."""
    rules = {}
    for result in check_finn(model).failures:
        rules.setdefault(result.rule, []).append(result.node)
    return rules


@pytest.mark.parametrize("name", READY)
def test_prepared_and_folded_networks_keep_every_rule(name):
    report = check_finn(ready(name))
    assert report.passed and [r.rule for r in report] == list(RULES), str(report)


def test_option_a_networks_pass_as_convolutions():
    model, x = resnet20(shortcut="A").eval(), torch.randn(2, 3, 32, 32)
    for variant in (model, convolution_shortcuts(model)):
        folded = fold(to_static(prepare(variant, x), [x]), x)
        padded = broken(folded).get("padding-shortcut", [])
        assert len(padded) == (2 if variant is model else 0)
    assert check_finn(folded).passed


def test_the_paper_s_placement_fails_where_it_leaves_floats():
    static = to_static(quantize(randomized(FOLDABLE["residual"](), 0), weight_quant=GranQWeightPerChannelSymmetric), [images64(1)])
    folded = fold(static, images64(0))
    rules = broken(folded)
    assert rules.keys() == {"integer-inputs", "residual-add", "pooling", "input-quantizer"}
    assert rules["input-quantizer"] == ["input_1"] and len(rules["residual-add"]) == 5 and rules["pooling"] == ["8"]
    assert "0" in rules["integer-inputs"] and "3.conv1" not in rules["integer-inputs"]


def test_unfolded_static_and_dynamic_models():
    model = prepare(randomized(FOLDABLE["without_norm"](), 0), images64(0, 1))
    static = to_static(model, [images64(1)])
    rules = broken(static)
    assert rules == {"unit-activations": ["1", "4", "pool_quant_0"], "zero-point": ["1", "4", "pool_quant_0"]}
    assert "per channel, shape [1, 6, 1, 1]" in check_finn(static).failures[0].message
    assert set(broken(model)["static-activations"]) == {"1", "4", "pool_quant_0"}  # the last one has no ranges yet
    floats = broken(randomized(FOLDABLE["without_norm"](), 0))
    assert floats["quantized-weights"] == ["0", "3", "7"] and floats["integer-inputs"] == ["0", "3", "7"]


@pytest.mark.parametrize("weight_quant, bits, rule", [
    (GranQWeightPerChannel, 4, "symmetric-weights"), (GranQWeightPerKernel, 4, "weight-scale"),
    (Int8WeightPerChannelFloat.let(narrow_range=False), 4, "symmetric-weights"),
    (GranQWeightPerChannelSymmetric, 9, "weight-bits"), (GranQWeightPerChannelSymmetric, None, "quantized-weights")])
def test_weights(weight_quant, bits, rule):
    rules = broken(ready("without_norm", weight_bit_width=bits, weight_quant=weight_quant))
    assert rules[rule] == (["0", "3"] if rule == "weight-scale" else ["0", "3", "7"])  # a linear weight has no kernels
    assert rules.keys() <= {rule, "symmetric-weights"}


def trainable():
    return ready("without_norm", trainable=True)


def with_layer(target, layer, name="without_norm"):
    model = ready(name)
    model.set_submodule(target, layer)
    return model


def const(layer, bits=4, scale=1.0, **options):
    return layer(act_quant=Uint8ActPerTensorFloat, bit_width=bits, scaling_impl_type="const", scaling_init=(2**bits - 1) * scale,
                 **options)


@pytest.mark.parametrize("build, expected", [
    (lambda: with_layer("1", const(qnn.QuantReLU, 9)), {"activation-bits": ["1"]}),
    (lambda: with_layer("1", const(qnn.QuantReLU, 1)), {"activation-bits": ["1"]}),
    (lambda: with_layer("1", const(qnn.QuantReLU, scale=0.5)), {"unit-activations": ["1"]}),
    (lambda: with_layer("1", const(qnn.QuantIdentity)), {"unsigned-behind-relu": ["1"]}),
    (lambda: with_layer("1", const(qnn.QuantReLU, float_to_int_impl_type="FLOOR")), {"rounding": ["1"]}),
    (lambda: with_layer("1", nn.ReLU()), {"integer-inputs": ["3"]}),
    (lambda: with_layer("1", nn.ReLU6()), {"integer-inputs": ["3"], "operators": ["1"]}),
    (lambda: with_layer("2", nn.AvgPool2d(2)), {"pooling": ["2"], "integer-inputs": ["3"]}),
    (lambda: with_layer("pool_quant_0", nn.Identity()), {"pooling": ["5"], "integer-inputs": ["7"]}),
    (lambda: with_layer("input_quant_0", nn.Identity()), {"input-quantizer": ["input_1"], "integer-inputs": ["0"]}),
    (lambda: with_layer("input_quant_0", qnn.QuantIdentity(
        act_quant=Int8ActPerTensorFixedPoint, scaling_impl_type="const", scaling_init=100.0, restrict_scaling_type="fp")),
     {"input-quantizer": ["input_quant_0"]}),
    (lambda: with_layer("residual_quant_1", nn.Identity(), "residual"), {"residual-add": ["add_1"]}),
])
def test_each_rule_names_the_node_that_breaks_it_alone(build, expected):
    assert broken(build()) == expected


def test_trainable_scales_pass_as_they_are_exported():
    assert check_finn(trainable()).passed and check_finn(bake(trainable())).passed


def test_branches_of_an_addition():
    class Add(nn.Module):
        def __init__(self, left, right):
            super().__init__()
            self.left, self.right = left, right

        def forward(self, x):
            return self.left(x) + self.right(x)

    def quant(bits=4, scale=1.0):
        return qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, bit_width=bits, scaling_impl_type="const",
                                 scaling_init=2.0**(bits - 1) * scale)

    assert check_finn(Add(quant(), quant())).passed
    messages = {name: [r.message for r in check_finn(Add(*pair)).failures if r.rule == "residual-add"] for name, pair in dict(
        scale=(quant(), quant(scale=2.0)), bits=(quant(), quant(5)), sign=(quant(), const(qnn.QuantReLU)),
        floats=(quant(), nn.Identity())).items()}
    assert "different scales" in messages["scale"][0] and "4 bits signed and 5 bits signed" in messages["bits"][0]
    assert "4 bits signed and 4 bits unsigned" in messages["sign"][0] and "adds a float (x)" in messages["floats"][0]


def test_a_concatenation_is_integer_where_all_its_operands_are():
    class Cat(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.image = qnn.QuantIdentity(
                act_quant=Int8ActPerTensorFixedPoint, scaling_impl_type="const", scaling_init=128.0)
            self.other, self.conv = other, qnn.QuantConv2d(6, 2, 1, weight_quant=GranQWeightPerChannelSymmetric, weight_bit_width=4)

        def forward(self, x):
            x = self.image(x)
            return self.conv(torch.cat([x, self.other(x)], 1))

    assert check_finn(Cat(const(qnn.QuantReLU))).passed
    assert broken(Cat(nn.BatchNorm2d(3))) == {"integer-inputs": ["conv"]}


def test_unmapped_operations_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = torch.sigmoid(self.conv(x)) * x.mean([2, 3], keepdim=True)[:, :1]
            return F.avg_pool2d(F.pad(x, (0, 0, 0, 0, 1, 1)), 2) * 2

    rules = broken(Net())
    assert set(rules["operators"]) == {"sigmoid", "getitem", "mul"}
    assert rules["padding-shortcut"] == ["pad"] and set(rules["pooling"]) == {"mean", "avg_pool2d"}


def test_the_report_prints_one_line_per_result():
    report = check_finn(to_static(quantize(randomized(FOLDABLE["mlp"](), 0)), [images64(1)]))
    lines = str(report).splitlines()
    assert len(lines) == len(report) + 1 and not report.passed
    assert lines[-1] == f"{len(RULES) - len({r.rule for r in report.failures})} of {len(RULES)} rules kept"
    assert any(line.startswith("FAIL  symmetric-weights") and "GranQWeightPerChannelSymmetric" in line for line in lines)
    assert sum(line.startswith("ok ") for line in lines) == sum(r.passed for r in report)


# --- QONNX


def qonnx_graph(**changes):
    """A quantized image, a convolution, a quantized ReLU, a pool, a linear layer; ``changes`` replace single constants."""
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.default_rng(0)
    constants = dict(
        in_scale=np.float32(0.25), w=rng.normal(size=(4, 3, 3, 3)), w_scale=rng.uniform(0.1, 1, (4, 1, 1, 1)), w_zero=np.float32(0),
        w_bits=np.float32(4), one=np.float32(1), zero=np.float32(0), act_scale=np.float32(1), act_zero=np.float32(0),
        act_bits=np.float32(4), eight=np.float32(8), fc=rng.normal(size=(2, 4)), fc_scale=rng.uniform(0.1, 1, (2, 1)))
    attributes = dict(act_signed=0, act_round="ROUND", w_narrow=1, w_signed=1, pool="GlobalAveragePool", relu="Relu",
                      conv=dict(kernel_shape=[3, 3], strides=[1, 1], pads=[0, 0, 0, 0], group=1), extra=[])
    constants |= {k: v for k, v in changes.items() if k in constants}
    attributes |= {k: v for k, v in changes.items() if k in attributes}

    def quant(x, scale, zero, bits, out, signed, narrow, rounding="ROUND"):
        return helper.make_node("Quant", [x, scale, zero, bits], [out], name=out, domain="qonnx.custom_op.general", signed=signed,
                                narrow=narrow, rounding_mode=rounding)

    nodes = [
        quant("x", "in_scale", "zero", "eight", "image", 1, 0),
        quant("w", "w_scale", "w_zero", "w_bits", "qw", attributes["w_signed"], attributes["w_narrow"]),
        helper.make_node("Conv", ["image", "qw"], ["conv"], name="conv", **attributes["conv"]),
        helper.make_node(attributes["relu"], ["conv"], ["relu"], name="relu"),
        quant("relu", "act_scale", "act_zero", "act_bits", "act", attributes["act_signed"], 0, attributes["act_round"]),
        *attributes["extra"],
        helper.make_node(attributes["pool"], ["act_x" if attributes["extra"] else "act"], ["pool"], name="pool",
                         **(dict(kernel_shape=[2, 2]) if attributes["pool"] == "AveragePool" else {})),
        quant("pool", "one", "zero", "eight", "pooled", 1, 1),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        quant("fc", "fc_scale", "zero", "eight", "qfc", 1, 1),
        helper.make_node("Transpose", ["qfc"], ["qfct"], name="transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["flat", "qfct"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13), helper.make_opsetid("qonnx.custom_op.general", 1)])


def node(*args, **kwargs):
    from onnx import helper
    return helper.make_node(*args, **kwargs)


@pytest.mark.parametrize("changes, expected", [
    ({}, {}),
    (dict(in_scale=0.3), {"input-quantizer": ["image"]}),
    (dict(act_scale=0.5), {"unit-activations": ["act"]}),
    (dict(act_scale=np.ones((1, 4, 1, 1))), {"unit-activations": ["act"]}),
    (dict(act_zero=np.zeros((1, 4, 1, 1))), {"zero-point": ["act"]}),
    (dict(act_zero=3), {"zero-point": ["act"]}),
    (dict(act_bits=9), {"activation-bits": ["act"]}),
    (dict(act_round="FLOOR"), {"rounding": ["act"]}),
    (dict(relu="Identity"), {"unsigned-behind-relu": ["act"]}),
    (dict(relu="Identity", act_signed=1), {}),
    (dict(relu="Sigmoid", act_signed=1), {"operators": ["relu"]}),
    (dict(w_scale=np.ones(())), {}),
    (dict(w_scale=np.ones((1, 3, 1, 1))), {"weight-scale": ["conv"]}),
    (dict(w_scale=np.ones((4, 3, 1, 1))), {"weight-scale": ["conv"]}),
    (dict(fc_scale=np.ones((1, 4))), {"weight-scale": ["fc"]}),
    (dict(w_zero=1), {"symmetric-weights": ["conv"]}),
    (dict(w_narrow=0), {"symmetric-weights": ["conv"]}),
    (dict(w_signed=0), {"symmetric-weights": ["conv"]}),
    (dict(w_bits=1), {"weight-bits": ["conv"]}),
    (dict(conv=dict(kernel_shape=[3, 3])), {"convolution-attributes": ["conv"]}),
    (dict(pool="ReduceMean"), {"pooling": ["pool"]}),
    (dict(pool="AveragePool"), {"pooling": ["pool"]}),
    (dict(extra=[("Mul", ["act", "w_scale"], "mul")]), {"rescale-as-batch-norm": ["mul"]}),
    (dict(extra=[("Mul", ["act", "one"], "mul")]), {}),
    (dict(extra=[("Add", ["act", "image"], "add")]), {"residual-add": ["add"]}),
    (dict(extra=[("Add", ["act", "act"], "add")]), {}),
    (dict(extra=[("Add", ["act", "conv"], "add")]), {"residual-add": ["add"]}),
    (dict(extra=[("QuantizeLinear", ["act", "one"], "q")]), {"operators": ["q"]}),
    (dict(extra=[("Transpose", ["act"], "t")]), {"operators": ["t"]}),
])
def test_each_rule_on_qonnx(changes, expected):
    pytest.importorskip("onnx")
    if "extra" in changes:
        (kind, inputs, name), = changes["extra"]
        changes = dict(changes, extra=[node(kind, inputs, ["act_x"], name=name)])
    assert broken(qonnx_graph(**changes)) == expected


def test_exported_networks_keep_every_rule(tmp_path):
    """Brevitas's own export of a folded network, with its own weight quantizer."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from brevitas.export import export_qonnx
    x = images64(0, 1).float()
    for name in ("residual", "mlp"):
        static = to_static(
            prepare(randomized(FOLDABLE[name](), 0).float(), x, weight_quant=Int8WeightPerChannelFloat), [images64(1).float()])
        for model, passes in ((fold(static, x), True), (fold(static, x).get_submodule("0" if name == "residual" else "1"), False)):
            path = tmp_path / f"{name}{passes}.onnx"
            example = x if passes or name == "residual" else torch.zeros(1, 192)
            export_qonnx(model, args=example, export_path=str(path), dynamo=False)
            report = check_finn(path)
            assert report.passed == passes, str(report)
            assert {r.rule for r in report.failures} == (set() if passes else {"integer-inputs", "input-quantizer"})


def test_bad_input(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(TypeError, match="a torch model, an ONNX model or the path of one, got int"):
        check_finn(3)
    with pytest.raises(FileNotFoundError):
        check_finn(tmp_path / "none.onnx")
    whole = qonnx_graph().SerializeToString()
    for content in (b"", b"not onnx at all", whole[:len(whole) // 2]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match="bad.onnx' is not a readable ONNX model: it is damaged, or another kind of file"):
            check_finn(tmp_path / "bad.onnx")
    (tmp_path / "good.onnx").write_bytes(whole)
    assert check_finn(str(tmp_path / "good.onnx")).passed


def test_torch_models_are_checked_without_onnx():
    code = ("import sys, torch; sys.modules['onnx'] = None; import importlib.util as u; u.find_spec = "
            "lambda n, *a, f=u.find_spec: None if n == 'onnx' else f(n, *a); import granq_plugin.deploy as d; "
            "print(d.check_finn(torch.nn.Sequential(torch.nn.Linear(2, 2))).passed)\n"
            "try: d.check_finn('x.onnx')\nexcept ModuleNotFoundError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "reading an ONNX file needs onnx: pip install 'granq-plugin[export]'"
    assert done.stdout.split("\n")[:2] == ["False", message], done.stderr
