"""What is asked of any model, by whatever takes one."""

import threading

import pytest

import granq_plugin as gq
from granq_plugin.deploy import bake, fold
from granq_plugin.freeze import freeze_weights
from granq_plugin.zero_shot import preset, zero_shot_qat
from networks import image, sequential


@pytest.mark.parametrize("function", [
    gq.quantize, freeze_weights, lambda m: freeze_weights(m, inplace=True), gq.fuse_batch_norm,
    lambda m: gq.to_static(m, [image()]), lambda m: gq.to_static(m, [image()], inplace=True), bake,
    lambda m: bake(m, inplace=True), lambda m: fold(m, image()),
    lambda m: gq.weights_quantized_once(m).__enter__(), lambda m: zero_shot_qat(m, sequential(), preset("cifar10"))])
def test_what_is_no_model(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        function("resnet")


def test_models_that_cannot_be_copied():
    model = sequential()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="model cannot be copied .*lock.*; conversions take inplace=True"):
        gq.quantize(model)
