"""Launches of Triton kernels that cost Python little.

Triton finds the compiled kernel anew at each launch, by all arguments, which takes longer than the GPU has to do for a tensor of
16 MB. Beside tensors, a kernel's arguments follow here from the layout; of tensors only whether they begin at a multiple of 16
bytes decides which compiled kernel it is.
"""

import triton
from torch import Tensor
from triton.compiler import CompiledKernel

__all__ = ["Launch"]


class Launch:
    """A kernel, its grid, and its arguments but the tensors, which come first: ``launch(*tensors)``.

    Args:
        kernel: its constexpr parameters come last. grid: up to three sizes. numbers: its arguments after the tensors.
        constants: its constexpr parameters and Triton's options, by name.

    A launch is for tensors of one device, and always of the same dtypes.
    """

    def __init__(self, kernel: triton.JITFunction, grid: tuple[int, ...], numbers: tuple, constants: dict) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        self._rest = *numbers, *(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[tuple[bool, ...], CompiledKernel] = {}

    def __call__(self, *tensors: Tensor) -> None:
        aligned = tuple([t.data_ptr() % 16 == 0 for t in tensors])
        compiled = self._compiled.get(aligned)
        if compiled is not None:
            compiled[self._grid](*tensors, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[aligned] = compiled
