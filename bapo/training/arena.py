"""Memory for what a training pass keeps until it has gone backwards: one piece, which the next pass takes again.

Allocated one by one, such tensors lie between short-lived ones, and passes of different lengths leave gaps between
them into which nothing fits: after a few, the process holds half as much again as it uses.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

# Times what a pass needs. Memory that nothing has written to costs nothing; but a longer pass, were it to take new
# memory, would have all of it made by the system again, a second for a gigabyte.
ROOM = 4
LINE = 64  # bytes of the processor's cache; every tensor starts at one


class Arena:
    """`numbers` is how many a pass keeps per token; what finds no room is allocated as usual."""

    def __init__(self, numbers: int):
        self.numbers = numbers
        self._memory: Tensor | None = None
        self._lent: Any = lambda: None  # weak reference to `_part` of the last pass: dead once its tensors are gone
        self._part: Any = None
        self._taken = 0

    def open(self, lines: Tensor) -> None:
        """Begin a pass over `lines` [tokens, …]. Where autograd keeps nothing, nothing is lent."""
        self._part, self._taken = None, 0
        on_cpu = lines.device.type == "cpu" and lines.dtype in (torch.float32, torch.float64)
        if not torch.is_grad_enabled() or not on_cpu:
            return
        count, memory = len(lines) * self.numbers, self._memory
        if memory is None or self._lent() is not None or memory.dtype != lines.dtype or len(memory) < count:
            self._memory = memory = None  # given back before there is another
            try:
                memory = torch.empty(ROOM * count, dtype=lines.dtype)
            except RuntimeError:  # some systems promise no more than they have
                memory = torch.empty(count, dtype=lines.dtype)
            self._memory = memory
        self._part = memory.numpy()
        self._lent = weakref.ref(self._part)

    def take(self, like: Tensor, width: int) -> Tensor:
        """An uninitialised tensor [tokens, width], of the tokens and the type of `like` [tokens, …]."""
        start, step = self._taken, LINE // like.itemsize
        end = start + len(like) * width
        if self._part is None or end > len(self._part) or self._part.itemsize != like.itemsize:
            return like.new_empty(len(like), width)
        self._taken = (end + step - 1) // step * step
        return torch.from_numpy(self._part[start:end].reshape(len(like), width))
