"""GranQ (arXiv 2503.18339) for Brevitas: per-channel low-bit quantization of trained networks without their training data.

Importing this package imports neither torch nor Brevitas; the first use of a public name does. Brevitas's own ``brevitas.export``
knows our quantizers as soon as one of them has been imported.
"""

import warnings
from typing import TYPE_CHECKING

from granq_plugin._version import __version__
from granq_plugin.lazy import lazy_names

if TYPE_CHECKING:  # for editors and type checkers
    from granq_plugin.calibrate import to_static
    from granq_plugin.convert import quantize
    from granq_plugin.freeze import freeze_weights, weights_quantized_once
    from granq_plugin.fusion import fuse_batch_norm
    from granq_plugin.quantizers import (
        GranQActPerChannel,
        GranQActPerChannelStatic,
        GranQWeightPerChannel,
        GranQWeightPerChannelSymmetric,
        GranQWeightPerKernel,
    )

__all__ = [
    "GranQActPerChannel",
    "GranQActPerChannelStatic",
    "GranQWeightPerChannel",
    "GranQWeightPerChannelSymmetric",
    "GranQWeightPerKernel",
    "__version__",
    "freeze_weights",
    "fuse_batch_norm",
    "quantize",
    "to_static",
    "weights_quantized_once",
]

__getattr__, __dir__ = lazy_names(__name__, {
    "freeze_weights": "granq_plugin.freeze",
    "fuse_batch_norm": "granq_plugin.fusion",
    "quantize": "granq_plugin.convert",
    "register_handlers": "granq_plugin.handlers",
    "to_static": "granq_plugin.calibrate",
    "weights_quantized_once": "granq_plugin.freeze",
} | dict.fromkeys((name for name in __all__ if name.startswith("GranQ")), "granq_plugin.quantizers"),
    submodules=("deploy", "export", "functional", "quantizers", "zero_shot"))

# Brevitas warns at import of an optional package that nothing here uses
warnings.filterwarnings("ignore", "fast_hadamard_transform package not found", UserWarning)
