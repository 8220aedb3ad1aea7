"""Fused versions of the quantizers of :mod:`granq_plugin.functional`: the same results, bit for bit, at the price of a copy.

On CPU a small C++ kernel that the system's compiler builds on first use (:mod:`~granq_plugin.kernels.native`), on GPU Triton
kernels (:mod:`~granq_plugin.kernels.triton_kernel`, :mod:`~granq_plugin.kernels.triton_frozen`). Everything else (layouts they do
not know, tracing, export, vmap, ``torch.compile``, no compiler) runs the operations of ``functional``. The environment variable
``GRANQ_KERNEL`` forces one: "eager", "compiled" or "triton". Triton before 3.6 flushes quotients below the normal numbers to 0.
"""

import os
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from granq_plugin import functional as GF
from granq_plugin.functional import GranQResult
from granq_plugin.kernels import compiled, native
from granq_plugin.kernels.layout import IDENTITY, Ahead, Before, Layout, layout_of, static_layout_of, whole_layout_of

__all__ = ["BACKENDS", "IDENTITY", "Ahead", "Before", "affine_quantize", "backend", "granq", "is_observed", "why_not_compiled"]

BACKENDS = ("eager", "compiled", "triton")
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_OF_A_SAMPLE, _MOST_ROWS = 2**27, 2**31  # values, and ranges, which Triton's addresses and grids can count
_PLAIN = (Tensor, nn.Parameter)  # subclasses (fake tensors, DTensor...) see torch's operations


def forced() -> str | None:
    """What ``GRANQ_KERNEL`` asks for, None where it is not set. Raises a ValueError for an unknown name."""
    name = os.environ.get("GRANQ_KERNEL")
    if name and name not in BACKENDS:
        raise ValueError(f"GRANQ_KERNEL must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


def why_not_compiled(dtype: torch.dtype = torch.float32) -> str | None:
    """Why the CPU kernel cannot be used for values of dtype: None if it can. Builds it if need be."""
    return native.problem(dtype)


def backend(x: Tensor, channel_axis: int = 1) -> str:
    """Which of "eager", "compiled" and "triton" quantizes x.

    Raises:
        ValueError: see GRANQ_KERNEL above. RuntimeError: it asks for a kernel that cannot be had here, saying why.
    """
    return _choose(x, channel_axis)[0]


def _choose(x: Tensor, channel_axis: int, layout_of=layout_of) -> tuple[str, Layout | None]:
    if type(x) not in _PLAIN or is_observed():
        return "eager", None
    name = forced()
    if name == "eager":
        return name, None
    layout = layout_of(x, channel_axis) if x.layout == torch.strided and x.is_floating_point() and not x.is_neg() else None
    if layout is None:
        return "eager", None
    if name == "triton" or (name is None and x.is_cuda):
        problem = _why_not_triton(x)
        counts = x.shape[1:].numel() < _MOST_OF_A_SAMPLE and layout.samples * layout.channels < _MOST_ROWS
        chosen = "triton" if problem is None and x.dtype in _TRITON_TYPES and counts else "eager"
    elif not x.is_cpu:
        return "eager", None
    else:
        chosen, problem = "compiled", native.problem(x.dtype)
    if problem is None:
        return chosen, layout
    if name:
        raise RuntimeError(f"GRANQ_KERNEL={name}, but: {problem}")
    return "eager", None


def _why_not_triton(x: Tensor) -> str | None:
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton runs on a GPU, and x is on {x.device} (TRITON_INTERPRET=1 interprets it on CPU, for tests)"
    return _triton_problem()


@cache
def _triton_problem() -> str | None:
    try:
        from granq_plugin.kernels import triton_kernel  # noqa: F401
    except ImportError as e:
        return f"Triton cannot be imported: {e}"
    return None


def is_observed() -> bool:
    """Whether something other than backward looks at the operations: compilation, tracing, dispatch modes, function transforms,
    forward-mode differentiation."""
    return bool(torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
                or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def granq(
        x: Tensor, bit_width: int, channel_axis: int = 1, before: Before = IDENTITY, ahead: Ahead | None = None) -> GranQResult:
    """:func:`granq_plugin.functional.granq` of ``before.apply(ahead.apply(x))``: BatchNorm, addition, ReLU, clamp, ranges,
    quantization and the gradient, fused.

    Args:
        x, bit_width, channel_axis: see :func:`granq_plugin.functional.granq`.
        before: a ReLU and a clamp to do first.
        ahead: a BatchNorm in evaluation mode and an addition to do ahead of them, with C on axis 1. On a GPU its result may differ
            from torch's in the last places, and where that decides a rounding, a value by one level.

    Returns:
        :class:`~granq_plugin.functional.GranQResult`. Keeps one bit of each value (on a GPU one byte) for the backward of a ReLU
        or clamp, and nothing without; for that of a BatchNorm, what BatchNorm keeps.

    Raises:
        TypeError, ValueError: as there; see also :func:`backend`.
    """
    chosen, layout = _choose(x, channel_axis)
    if ahead is not None and not _is_fused(x, channel_axis, ahead, chosen, layout):
        x, ahead = ahead.apply(x), None
        chosen, layout = _choose(x, channel_axis)
    if chosen != "eager":
        return _dynamic_kernel(chosen).granq(x, GF.check_bit_width(bit_width), layout, before, ahead)
    return GF.granq(before.apply(x), bit_width, channel_axis)


def affine_quantize(
        x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], channel_axis: int = 1,
        before: Before = IDENTITY, ahead: Ahead | None = None) -> Tensor:
    """:func:`granq_plugin.functional.affine_quantize` of ``before.apply(ahead.apply(x))`` in one pass: frozen ranges, and weights.

    Args:
        x, scale, zero_point, limits: see there; scale and zero_point with one element per channel, or one for all.
        channel_axis: where the channels stand. before, ahead: see :func:`granq`.

    Returns:
        As there. Keeps one bit of each value (on a GPU one byte) for the backward.
    """
    layout_for = whole_layout_of if scale.numel() == 1 else static_layout_of
    chosen, layout = _choose(x, channel_axis, layout_for)
    if ahead is not None and (layout_for is whole_layout_of or not _is_fused(x, channel_axis, ahead, chosen, layout)):
        x, ahead = ahead.apply(x), None
        chosen, layout = _choose(x, channel_axis, layout_for)
    if chosen != "eager":
        wide = torch.promote_types(x.dtype, torch.float32)
        if all(t.dtype == wide and t.device == x.device and t.is_contiguous() and not t.is_neg() and t.numel() == layout.channels
               for t in (scale, zero_point)):
            return _frozen_kernel(chosen).affine_quantize(x, scale.detach(), zero_point.detach(), limits, layout, before, ahead)
    return GF.affine_quantize(before.apply(x, ahead), scale, zero_point, limits)


def _dynamic_kernel(chosen: str):
    if chosen == "compiled":
        return compiled
    from granq_plugin.kernels import triton_kernel
    return triton_kernel


def _frozen_kernel(chosen: str):
    if chosen == "compiled":
        return compiled
    from granq_plugin.kernels import triton_frozen
    return triton_frozen


def _is_fused(x: Tensor, channel_axis: int, ahead: Ahead, chosen: str, layout: Layout | None) -> bool:
    """Whether the kernel chosen for x computes this BatchNorm, too: on the CPU bit for bit as torch does."""
    if chosen == "eager" or x.dim() < 3 or channel_axis not in (1, 1 - x.dim()) or x.dtype == torch.float64:
        return False
    if not all(
            t is None or (type(t) in _PLAIN and t.dtype == torch.float32 and t.device == x.device and t.is_contiguous()
                          and not t.is_neg() and t.numel() == x.shape[1]) for t in ahead[:4]):
        return False
    y = ahead.residual
    if y is not None and not (type(y) in _PLAIN and y.dtype == x.dtype and y.device == x.device and y.shape == x.shape
                              and y.stride() == x.stride() and not y.is_neg()):
        return False
    return chosen == "triton" or _computes_batch_norm(x.dtype, layout.memory_format)


@cache
def _computes_batch_norm(dtype: torch.dtype, memory_format: torch.memory_format) -> bool:
    """Whether the CPU kernel's BatchNorm and addition have the bits of torch's here: tried once, for they depend on the processor
    and on how torch was built. 16 bits and 256 ranges show a difference in the last place."""
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    spatial = (7, 3, 3) if memory_format == torch.channels_last_3d else (7, 9)
    x, residual = (draw(4, 64, *spatial).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    ahead = Ahead(draw(64), draw(64).square() + 0.1, draw(64), draw(64), 1e-5, residual)
    with torch.no_grad():
        actual = compiled.granq(x, 16, layout_of(x, 1), IDENTITY, ahead)
        return all(map(torch.equal, actual, GF.granq(ahead.apply(x), 16)))
