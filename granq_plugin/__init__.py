"""GranQ (arXiv 2503.18339) for Brevitas: per-channel low-bit quantization of trained networks without their training data."""

import warnings

from granq_plugin._version import __version__

with warnings.catch_warnings():  # Brevitas warns at import of an optional package that nothing here uses
    warnings.filterwarnings("ignore", "fast_hadamard_transform package not found", UserWarning)
    from granq_plugin.calibrate import to_static
    from granq_plugin.convert import quantize
    from granq_plugin.export import register_handlers
    from granq_plugin.quantizers import (
        GranQActPerChannel,
        GranQActPerChannelStatic,
        GranQWeightPerChannel,
        GranQWeightPerChannelSymmetric,
        GranQWeightPerKernel,
    )
    register_handlers()

__all__ = [
    "GranQActPerChannel",
    "GranQActPerChannelStatic",
    "GranQWeightPerChannel",
    "GranQWeightPerChannelSymmetric",
    "GranQWeightPerKernel",
    "__version__",
    "quantize",
    "to_static",
]
