"""Chooses one tile for many batch sizes, so that kernels compiled for one batch size serve others too.

With a separate tile for each batch size, a last, short batch would recompile most kernels: more than a minute in the
middle of training. So tiles are chosen for the batch size rounded up to a power of two, and each for as many
consecutive powers as it is fast enough for, by the cost rule: within 5 % of the fastest if the GPU is full, as in
training, and within 30 % below that. The choice depends only on the shape, not on earlier batches.
"""

from typing import TypeVar

import numpy as np

from rir_kernels.triton.tiling.conv_cost import power_of_two_at_least

BATCHES = tuple(1 << power for power in range(10, -1, -1))  # the choice doesn't change above the first
SLACK = tuple(1.05 if batch >= 128 else 1.3 for batch in BATCHES)

Tile = TypeVar("Tile", bound=tuple)


def rounded(batch: int) -> int:
    """Returns the member of BATCHES whose tile a batch of this size takes."""
    return min(BATCHES[0], power_of_two_at_least(batch))


def stacked(tiles: list[Tile]) -> Tile:
    """Stacks the tiles into one whose fields are arrays, as `conv_cost` and `wgrad_cost` accept."""
    return type(tiles[0])(*[np.array(field).T for field in zip(*tiles, strict=True)])


def serve(tiles: list[Tile], clocks: np.ndarray) -> dict[int, Tile]:
    """Returns {batch: tile} from `clocks` [BATCHES, tiles]: the fewest tiles that are all within SLACK."""
    relative = clocks / clocks.min(1, keepdims=True)
    good = relative <= np.array(SLACK)[:, None]
    serving: dict[int, Tile] = {}
    first = 0
    while first < len(BATCHES):
        lasting = np.cumprod(good[first:], axis=0).sum(0)
        end = first + lasting.max()
        losses = np.where(lasting == lasting.max(), relative[first:end].sum(0), np.inf)
        serving |= dict.fromkeys(BATCHES[first:end], tiles[losses.argmin()])
        first = end
    return serving
