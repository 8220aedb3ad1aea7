"""Launches of Triton kernels that cost Python little.

Triton finds the compiled kernel anew at each launch, by all arguments, which takes longer than the GPU has to do for a tensor of
16 MB. Beside tensors, a kernel's arguments follow here from the layout; of tensors only whether they begin at a multiple of 16
bytes decides which compiled kernel it is.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

__all__ = ["Fastest", "Launch"]


class Launch:
    """A kernel, its grid, and its arguments but the tensors, which come first: ``launch(*tensors)``.

    Args:
        kernel: its constexpr parameters come last. grid: up to three sizes. numbers: its arguments after the tensors.
        constants: its constexpr parameters and Triton's options, by name.

    A launch is for tensors of one device, and always of the same dtypes.

    Attributes:
        kernel, grid (three sizes), constants: as given. arguments: all after the tensors, in the kernel's order.
    """

    def __init__(self, kernel: triton.JITFunction, grid: tuple[int, ...], numbers: tuple, constants: dict) -> None:
        self.kernel, self.grid, self.constants, self._numbers = kernel, (*grid, 1, 1)[:3], constants, numbers
        self.arguments = *numbers, *(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[tuple[bool, ...], CompiledKernel] = {}

    def __call__(self, *tensors: Tensor) -> None:
        compiled = self.compiled(tensors)
        if compiled is not None:
            compiled[self.grid](*tensors, *self.arguments)
            return
        compiled = self.by_triton(*tensors)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[_alignment(tensors)] = compiled

    def compiled(self, tensors: tuple[Tensor, ...]) -> CompiledKernel | None:
        """The kernel for these tensors; None before their first launch."""
        return self._compiled.get(_alignment(tensors))

    def by_triton(self, *tensors: Tensor) -> CompiledKernel | None:
        """The same launch where Triton looks for the compiled kernel, or compiles it; returns it."""
        return self.kernel[self.grid](*tensors, *self._numbers, **self.constants)


class Fastest:
    """Launches that do the same, ``launch(*tensors)`` each: all are timed with the first tensors that come, and the fastest one is
    taken from then on. Where times cannot be taken, without a GPU or while a CUDA graph is recorded, it is the first one."""

    def __init__(self, *launches: Callable[..., None]) -> None:
        self.launches = launches
        self._chosen: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        if self._chosen is None and tensors[0].is_cuda and not torch.cuda.is_current_stream_capturing():
            self._chosen = self._fastest(tensors)
        (self._chosen or self.launches[0])(*tensors)

    def _fastest(self, tensors: tuple[Tensor, ...]) -> Callable[..., None]:
        chosen, least = self.launches[0], float("inf")
        for launch in self.launches:
            try:
                launch(*tensors)  # compiles
            except OutOfResources:  # on this GPU
                continue
            time = _milliseconds(launch, tensors, 1)
            if time < 4 * least:  # else it is a matter of more than a few launches
                time = min(_milliseconds(launch, tensors, 10) for _ in range(2))
            if time < least:
                chosen, least = launch, time
        return chosen


def _milliseconds(launch: Callable[..., None], tensors: tuple[Tensor, ...], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        launch(*tensors)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def _alignment(tensors: tuple[Tensor, ...]) -> tuple[bool, ...]:
    return tuple([t.data_ptr() % 16 == 0 for t in tensors])
