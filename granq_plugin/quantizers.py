"""The quantizers that users name, as Brevitas injectors: pass the class to ``act_quant=``, ``input_quant=``, ``weight_quant=``...

Options are keyword arguments of the Brevitas layer (``QuantReLU(act_quant=GranQActPerChannel, bit_width=4)``; with the prefix
``input_``, ``output_`` or ``weight_`` where the layer has several quantizers) or of ``.let(...)``.
"""

from inspect import isclass

import brevitas.nn as qnn
from brevitas.core.function_wrapper import TensorClamp, TensorClampSte
from brevitas.inject import ExtendedInjector, value
from brevitas.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
)
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjectorBase
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver

from granq_plugin.core.dynamic import DynamicGranQ
from granq_plugin.core.proxy import GranQDynamicActProxy, GranQPerKernelWeightProxy, GranQStaticActProxy, GranQWeightProxy
from granq_plugin.core.ranges import CollectedRange, DynamicRange
from granq_plugin.core.static import StaticGranQ
from granq_plugin.core.weight import MinMaxWeightQuant, PerKernelGranQ
from granq_plugin.handlers import register_handlers

__all__ = [
    "GranQActPerChannel",
    "GranQActPerChannelStatic",
    "GranQWeightPerChannel",
    "GranQWeightPerChannelSymmetric",
    "GranQWeightPerKernel",
    "check_quantizer",
]

register_handlers()


class _UnsignedInt8(ExtendedInjector):
    """Unsigned integers, rounded to nearest even, per-channel float scales, 8 bits unless the layer says otherwise."""
    quant_type = QuantType.INT
    bit_width_impl_type = BitWidthImplType.CONST
    bit_width = 8
    float_to_int_impl_type = FloatToIntImplType.ROUND
    restrict_scaling_type = RestrictValueType.FP
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    scaling_impl_type = ScalingImplType.STATS
    signed = False
    narrow_range = False


class _HardTanhLimits(ExtendedInjector):
    """Clamp before quantization only where the layer is a HardTanh or gives limits of its own."""

    @value
    def min_val(module=None):
        return -1.0 if isinstance(module, qnn.QuantHardTanh) else None

    @value
    def max_val(module=None):
        return 1.0 if isinstance(module, qnn.QuantHardTanh) else None


class GranQActPerChannel(_UnsignedInt8, _HardTanhLimits, ActQuantSolver):
    """
    The paper's activation quantizer: dynamic, asymmetric, one range per sample and channel (one per row of a ``[B, F]`` input),
    identity gradient. No calibration, no state, no shape arguments.

    Options: ``bit_width`` (1 to 16, default 8), ``channel_axis`` (default 1), ``min_val`` / ``max_val`` (clamp before
    quantization), ``check_finite`` (raise on NaN or Inf, which otherwise poison their own channel).

    Examples:
        >>> from brevitas.nn import QuantReLU
        >>> act = QuantReLU(act_quant=GranQActPerChannel, bit_width=4)
    """
    tensor_quant = DynamicGranQ
    scaling_impl = DynamicRange
    proxy_class = GranQDynamicActProxy


class GranQActPerChannelStatic(_UnsignedInt8, _HardTanhLimits, ActQuantSolver):
    """
    Per-channel activation quantizer with ranges that are collected (in training mode, or under ``calibration_mode``) and then
    frozen into the state dict. Unsigned with zero point 0 after a ReLU, otherwise asymmetric; symmetric with ``signed=True``.
    No shape arguments.

    Options: those of :class:`GranQActPerChannel`, and ``signed``, ``narrow_range``, ``range_mode`` ("ema", "minmax", or "mse"
    for ranges of least squared error), ``momentum``, ``collect_stats_steps``, ``learned_scale``, ``sync_ranges``:
    see :class:`~granq_plugin.core.static.StaticGranQ`.

    Examples:
        >>> from brevitas.nn import QuantReLU
        >>> act = QuantReLU(act_quant=GranQActPerChannelStatic, bit_width=4, range_mode="minmax")
    """
    tensor_quant = StaticGranQ
    scaling_impl = CollectedRange
    proxy_class = GranQStaticActProxy


class GranQWeightPerChannel(_UnsignedInt8, WeightQuantSolver):
    """
    Weight quantizer per output channel, asymmetric min/max (the range is stretched to contain 0), identity gradient.

    Options: ``bit_width`` (1 to 16, default 8), ``range_mode``: "minmax", or "mse" for ranges of least squared error, which clip
    what lies far out (see :class:`~granq_plugin.core.weight.MinMaxWeightQuant`).

    Examples:
        >>> from brevitas.nn import QuantConv2d
        >>> conv = QuantConv2d(8, 16, 3, weight_quant=GranQWeightPerChannel, weight_bit_width=4)
    """
    tensor_quant = MinMaxWeightQuant
    proxy_class = GranQWeightProxy
    range_mode = "minmax"

    @value
    def tensor_clamp_impl(range_mode):  # as in Brevitas: only a range that need not hold all weights keeps gradients from some
        return TensorClamp if range_mode == "mse" else TensorClampSte


class GranQWeightPerChannelSymmetric(GranQWeightPerChannel):
    """
    Weight quantizer per output channel, symmetric with narrow range and zero point 0, identity gradient: what integer
    accelerators (FINN, hls4ml) take. At least 2 bits. Options as for :class:`GranQWeightPerChannel`.

    Examples:
        >>> from brevitas.nn import QuantConv2d
        >>> conv = QuantConv2d(8, 16, 3, weight_quant=GranQWeightPerChannelSymmetric, weight_bit_width=4)
    """
    signed = True
    narrow_range = True


class GranQWeightPerKernel(_UnsignedInt8, WeightQuantSolver):
    """
    For comparison with the paper only: what the GranQ authors' code does to weights. One range per (output, input) kernel of a
    convolution, so that 1x1 kernels (one value each) stay unquantized in effect, and one per row of a linear weight.
    No integer accelerator runs a dense convolution with such scales; never mix its results with per-output-channel ones.

    Examples:
        >>> from brevitas.nn import QuantConv2d
        >>> conv = QuantConv2d(8, 16, 3, weight_quant=GranQWeightPerKernel, weight_bit_width=4)
    """
    tensor_quant = PerKernelGranQ
    proxy_class = GranQPerKernelWeightProxy


def check_quantizer(argument: str, quant, proxy_class: type) -> None:
    """Raise a TypeError unless ``quant`` is a Brevitas injector whose proxy is a ``proxy_class``; ``argument`` names it."""
    if not isclass(quant) or not issubclass(getattr(quant, "proxy_class", object), proxy_class):
        kinds = {
            WeightQuantProxyFromInjectorBase: "a Brevitas weight quantizer, such as GranQWeightPerChannel",
            ActQuantProxyFromInjectorBase: "a Brevitas activation quantizer, such as GranQActPerChannel",
            GranQStaticActProxy: "GranQActPerChannelStatic or made from it with .let()"}
        raise TypeError(f"{argument} must be {kinds[proxy_class]}; got {getattr(quant, '__name__', repr(quant))}")
