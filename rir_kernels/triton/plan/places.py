"""Places of tensors in a plan's buffers, and slots for per-call numbers; used by `plan` and its steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


class Unplannable(Exception):
    """Raised if a function does more than a plan can replay."""


class Slot(float):
    """Placeholder for scalars[i] of a call while a plan is recorded: a number that a kernel takes unchanged."""


@dataclass(frozen=True)
class Place:
    """A tensor's place in one of the plan's buffers, in elements."""

    buffer: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def start(self) -> int:
        """Returns the offset from the buffer's address, in bytes."""
        return self.offset * self.dtype.itemsize

    def view(self, buffers) -> torch.Tensor:
        buffer = buffers[self.buffer]
        if buffer.dtype != self.dtype:
            buffer = buffer.view(self.dtype)
        return buffer.as_strided(self.size, self.stride, buffer.storage_offset() + self.offset)


def binder(arg, of_tensor: Callable) -> Callable | None:
    """Returns a function that makes a kernel's argument from (buffers, scalars); None if it never changes.

    of_tensor: returns that function for a tensor or a descriptor. A tuple is bound part by part.
    """
    if isinstance(arg, Slot):
        index = int(arg)
        return lambda _buffers, scalars: scalars[index]
    if isinstance(arg, (torch.Tensor, TensorDescriptor)):
        return of_tensor(arg)
    if not isinstance(arg, tuple):
        return None
    parts = [(binder(part, of_tensor), part) for part in arg]
    if not any(bind for bind, _ in parts):
        return None
    make = like(arg)
    return lambda buffers, scalars: make([bind(buffers, scalars) if bind else part for bind, part in parts])


def like(arg: tuple) -> Callable:
    """Returns the function that makes a tuple of the same class from its parts."""
    return getattr(arg, "_make", tuple)
