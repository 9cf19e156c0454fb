"""Where one layer's output is the next one's input alone, and what their backward passes spare each other.

A norm's backward starts with sums over dy and z. dy is what the layer behind computes last, its dx: that kernel holds
each number in its registers, reads z beside it, and leaves the sums, which spares a pass over memory. Whether dy really
is that dx is found out when it arrives: where autograd has added another gradient to it, or a hook has changed it, the
sums are not used. A hook that changes it through `.data` is seen by nobody, here as anywhere in autograd.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Link:
    """What a layer's node in the graph shows to the layers behind it."""

    # what the sums are made of, until backward has run: z, mean, invstd, weight and bias of the norm, whether a ReLU
    norm: tuple | None
    consumers: int = 0  # fused layers that took the output in
    _sums: tuple | None = None

    def offers_sums(self) -> bool:
        """Where several layers took the output in, autograd will add their gradients: the sums would be of none."""
        return self.norm is not None and self.consumers == 1

    def offer(self, dx: torch.Tensor, sums: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The sums over dx, which the layer behind returns; held, so that nobody adds to it in place."""
        self._sums = dx, dx._version, sums

    def claim(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(dbeta, dgamma) if they are those of dy; nothing is held any more."""
        left, self._sums, self.norm = self._sums, None, None
        if left is None:
            return None
        dx, version, sums = left
        same = dy.data_ptr() == dx.data_ptr() and dy._version == version and dy.stride() == dx.stride()
        return sums if same and dy.shape == dx.shape else None
