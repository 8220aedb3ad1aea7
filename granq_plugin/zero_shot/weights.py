"""What is done to a student's weights around its optimizer's steps: averaging, and a look at the sharpest neighbour."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage", "at_sharpest_neighbour", "load_optimizer"]


class WeightAverage:
    """Exponential moving average of parameters; its first steps forget faster, so that it does not lag behind a start.

    Args:
        decay: weight of the past, 0 to below 1, reached after some ``10 / (1 - decay)`` updates.
    """

    def __init__(self, params: Sequence[nn.Parameter], decay: float) -> None:
        self._params, self._decay, self._count = list(params), decay, 0
        self._mean = [p.detach().clone() for p in self._params]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in."""
        self._count += 1
        keep = min(self._decay, self._count / (self._count + 9))
        for i, (mean, p) in enumerate(zip(self._mean, self._params)):
            if mean.shape != p.shape:  # a learned scale that has just begun
                self._mean[i] = p.detach().clone()
            else:
                mean.lerp_(p, 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the parameters' values; twice is nothing."""
        for i, (mean, p) in enumerate(zip(self._mean, self._params)):
            if mean.shape == p.shape:
                self._mean[i] = p.detach().clone()
                p.copy_(mean)

    def state(self) -> dict:
        return dict(mean=self._mean, count=self._count)

    def load_state(self, state: dict) -> None:
        """Raises a ValueError for the state of other parameters."""
        if len(state["mean"]) != len(self._params) or type(state["count"]) is not int:
            raise ValueError("the average is of other parameters")
        self._mean = [m.to(p) for m, p in zip(state["mean"], self._params)]
        self._count = state["count"]


@contextlib.contextmanager
def at_sharpest_neighbour(params: Sequence[nn.Parameter], grads: Sequence[Tensor], rho: float) -> Iterator[None]:
    """Inside the block, the parameters stand ``rho`` further along the gradient (sharpness-aware minimization, arXiv 2010.01412);
    after it, they have exactly their old values."""
    norm = torch.stack([g.norm() for g in grads]).norm().clamp_min(1e-12)
    old = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads):
            p.add_(g * (rho / norm))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(params, old):
                p.copy_(value)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restore an optimizer's state. Raises a ValueError if it has other options, but for the learning rate and how it is computed,
    or other shapes."""
    def options() -> list[dict]:
        ignored = ("params", "lr", "fused", "foreach")
        return [{k: v for k, v in group.items() if k not in ignored} for group in optimizer.param_groups]
    own = options()
    optimizer.load_state_dict(state)
    if options() != own:
        raise ValueError("the optimizer has other options")
    for p, values in optimizer.state.items():
        wrong = [k for k, v in values.items() if isinstance(v, Tensor) and v.dim() and v.shape != p.shape]
        if wrong:
            raise ValueError(f"the optimizer's {wrong[0]} is not of its parameter's shape {list(p.shape)}")
