"""Cross-layer backward fusion: a dgrad kernel also computes the upstream batch norm's reductions.

It applies where one layer's output is the input of the next one only. A norm's backward starts with sums over dy and z.
dy is what the next layer computes last, its dx: that kernel holds each number in registers, also reads z, and computes
the sums, which saves a pass over memory. Whether dy really is that dx is checked when it arrives: if autograd has added
another gradient to it, or a hook has changed it, the sums are not used. A hook that changes it through `.data` goes
undetected, here as anywhere in autograd.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Link:
    """What a layer's graph node exposes to the layers after it."""

    # inputs of the sums, until backward has run: z, mean, invstd, weight, bias and activation of the norm
    norm: tuple | None
    consumers: int = 0  # fused layers that take the output as input
    _sums: tuple | None = None

    def offers_sums(self) -> bool:
        """Whether the output has one consumer: autograd adds the gradients of several, so no dx has the right sums."""
        return self.norm is not None and self.consumers == 1

    def offer(self, dx: torch.Tensor, sums: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Stores the sums over dx, which the next layer returns; while held, autograd does not add to it in place."""
        self._sums = dx, dx._version, sums

    def claim(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns (dbeta, dgamma) if they are those of dy, and releases everything held."""
        left, self._sums, self.norm = self._sums, None, None
        if left is None:
            return None
        dx, version, sums = left
        same = dy.data_ptr() == dx.data_ptr() and dy._version == version and dy.stride() == dx.stride()
        return sums if same and dy.shape == dx.shape else None
