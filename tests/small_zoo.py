"""A small zoo network, and quantized ones of every kind as training leaves them."""

import torch

from granq_plugin.deploy import bake
from zoo.card import Card
from zoo.quantization import Quantization
from zoo.students import calibrator

SMALL = Card.from_toml("small", """
architecture = "zoo.models.cifar_resnet:CifarResNet"
dataset = "cifar10"
num_classes = 10
[architecture_args]
depth = 8
shortcut = "B"
[preprocessing]
image_size = 8
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
""")
KINDS = [Quantization(3, 3), Quantization(4, 4, "per-kernel"), Quantization(2, 4, "per-output-channel-symmetric"),
         Quantization(5, 4, activations="static"),
         Quantization(3, 4, activations="static", learned_scale=True, weight_range_mode="mse"),
         Quantization(3, 4, "per-output-channel-symmetric", "folded", weight_range_mode="mse", act_range_mode="mse")]


def trained(quantization, seed=0):
    """``(network, ranges)`` as a run leaves them, with weights and statistics that are not the initial ones."""
    torch.manual_seed(seed)
    teacher, batches = SMALL.build(), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    with torch.no_grad():
        teacher.train()(batches[0])
    calibrated = {}

    def calibrate(prepared):
        prepared = calibrator(batches)(prepared)
        calibrated.update(prepared.state_dict())
        return prepared
    network = quantization.build(teacher.eval(), torch.zeros(1, 3, 8, 8), calibrate)
    if quantization.activations == "static":
        calibrator(batches)(network)
    if quantization.activations == "folded":
        network = bake(network)
    return network.eval(), calibrated
