"""GranQ (arXiv 2503.18339) for Brevitas: per-channel low-bit quantization of trained networks without their training data."""

from granq_plugin._version import __version__
from granq_plugin.convert import quantize, to_static
from granq_plugin.export import register_handlers
from granq_plugin.quantizers import (
    GranQActPerChannel,
    GranQActPerChannelStatic,
    GranQWeightPerChannel,
    GranQWeightPerChannelSymmetric,
    GranQWeightPerKernel,
)

__all__ = [
    "__version__",
    "GranQActPerChannel",
    "GranQActPerChannelStatic",
    "GranQWeightPerChannel",
    "GranQWeightPerChannelSymmetric",
    "GranQWeightPerKernel",
    "quantize",
    "to_static",
]

register_handlers()
