"""CUDA graphs: a step that is a thousand launches, recorded once and then launched as one.

At the batch sizes of zero-shot QAT a GPU waits for Python most of the time. A recorded step runs the same kernels on the same
memory: results are those of the step itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RecordedStep", "check_device"]


def check_device(device: torch.device, network: str, world: int = 1) -> None:
    """Raise a ValueError, before work starts, where nothing can be recorded: without a GPU, or in one of several processes."""
    if device.type != "cuda":
        raise ValueError(f"compile='cudagraphs' needs a GPU; the {network} is on {device}")
    if world > 1:
        raise ValueError(f"compile='cudagraphs' is for one process, and these are {world}: use off")
    current = torch.cuda.current_device()
    if device.index not in (None, current):
        raise ValueError(f"compile='cudagraphs' records on the current GPU, cuda:{current}, and the {network} is on {device}; "
                         f"with CUDA_VISIBLE_DEVICES={device.index} it is cuda:0")


class RecordedStep:
    """``step(*inputs)``, recorded as a CUDA graph after a few calls.

    Args:
        step: a function of tensors that reads no value back from the GPU, on parameters and buffers that keep their memory. What it
            returns is returned by every call, with other values: copy what shall outlast the next call.
        warm_up: calls that run the step itself, so that libraries and kernels are there before they are recorded.
        pool: of ``torch.cuda.graph_pool_handle()``, for steps that may overwrite one another's results; None: memory of its own.

    Raises:
        ValueError: at a call with inputs of other shapes than the recorded ones.
    """

    def __init__(self, step: Callable, warm_up: int = 3, pool: tuple[int, int] | None = None) -> None:
        self._step, self._left, self._pool = step, warm_up, pool
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs = None

    def __call__(self, *inputs: Tensor):
        if self._left:
            self._left -= 1
            return self._beside(inputs)
        if self._graph is None:
            self._record(inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            if own.shape != given.shape:
                raise ValueError(f"recorded for inputs of shape {list(own.shape)}, got {list(given.shape)}")
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _beside(self, inputs: tuple[Tensor, ...]):
        """On a stream of its own, as what a graph records must have run once."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = self._step(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [x.detach().clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=self._pool):
            self._outputs = self._step(*self._inputs)
