"""Where the tensors of a recorded call lie, and what of it is new in each call: what `plan` and its steps speak of."""

from dataclasses import dataclass

import torch


class Unplannable(Exception):
    """What was to be recorded does more than a plan can repeat."""


class Slot(float):
    """Stands for scalars[i] of a call while a plan is recorded: a number that a kernel is handed as it is."""


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
        """Bytes from the buffer's address."""
        return self.offset * self.dtype.itemsize

    def view(self, buffers) -> torch.Tensor:
        buffer = buffers[self.buffer]
        if buffer.dtype != self.dtype:
            buffer = buffer.view(self.dtype)
        return buffer.as_strided(self.size, self.stride, buffer.storage_offset() + self.offset)
