"""Places of tensors in a plan's buffers, and slots for per-call numbers; used by `plan` and its steps."""

from dataclasses import dataclass

import torch


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
