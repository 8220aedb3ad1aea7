"""A memory of synthetic images with the teacher's logits."""

import torch
from torch import Tensor

__all__ = ["ImageMemory"]


class ImageMemory:
    """The latest ``capacity`` images of the global batch, in float16, and their teacher logits.

    Every rank holds all of them, so that a draw does not depend on the number of ranks.

    Args:
        capacity: 0: nothing is kept. device: where they are kept; that of the networks, as a GPU would wait for images of the CPU.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self._images = torch.empty(0, dtype=torch.float16, device=device)
        self._logits = torch.empty(0, device=device)
        self._next = 0

    def __len__(self) -> int:
        return len(self._images)

    def images(self) -> Tensor:
        """The images ``[N, C, S, S]``, float16, on the CPU."""
        return self._images.cpu()

    def add(self, images: Tensor, logits: Tensor) -> None:
        """Add a global batch; beyond the capacity it takes the place of the oldest images."""
        if self.capacity == 0:
            return
        images, logits = images.to(self._images), logits.to(self._logits.device)
        room = self.capacity - len(self)
        if room > 0:
            self._images = torch.cat([self._images, images[:room]]) if len(self) else images[:room].clone()
            self._logits = torch.cat([self._logits, logits[:room]]) if len(self._logits) else logits[:room].clone()
            images, logits = images[room:], logits[room:]
        if not len(images):
            return
        places = ((self._next + torch.arange(len(images))) % self.capacity).to(images.device, non_blocking=True)
        self._images[places], self._logits[places] = images, logits
        self._next = (self._next + len(images)) % self.capacity

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` images drawn with replacement, a global batch in float16, and their logits."""
        chosen = torch.randint(len(self), (count, ), generator=rng).to(self._images.device, non_blocking=True)
        return self._images[chosen], self._logits[chosen]

    def state(self) -> dict:
        return dict(images=self._images, logits=self._logits, next=self._next)

    def load_state(self, state: dict, image_shape: tuple[int, ...], classes: int) -> None:
        """Restore :meth:`state`. Raises a ValueError unless images are ``[N, *image_shape]``, N up to the capacity."""
        images, logits, start = state["images"], state["logits"], state["next"]
        if len(images) and (images.shape[1:] != image_shape or logits.shape != (len(images), classes)):
            raise ValueError(f"the memory's images are {list(images.shape)}, their logits {list(logits.shape)}")
        if len(images) > self.capacity or start not in range(max(1, self.capacity)):
            raise ValueError(f"the memory holds {len(images)} images, the next at {start!r}, of {self.capacity}")
        self._images, self._logits, self._next = images.to(self._images.device), logits.to(self._logits.device), start
