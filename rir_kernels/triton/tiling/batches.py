"""One tile for many batches: kernels that were compiled for one batch serve others too.

With a tile for each batch by itself most kernels would be compiled anew for a last, short batch: more than a minute in
the middle of training. So tiles are chosen for the batch rounded up to a power of two, and each for as many powers in a
row as it is fast enough for, by the rule that chooses: within 5 % of the fastest where a GPU is full, which is where
networks are trained, and within 30 % below. That is a function of the shape alone, whatever batches came before.
"""

from typing import TypeVar

import numpy as np

from rir_kernels.triton.tiling.conv_cost import power_of_two_at_least

BATCHES = tuple(1 << power for power in range(10, -1, -1))  # from where nothing more changes, down to one image
SLACK = tuple(1.05 if batch >= 128 else 1.3 for batch in BATCHES)

Tile = TypeVar("Tile", bound=tuple)


def rounded(batch: int) -> int:
    """Of BATCHES the one whose tile such a batch takes."""
    return min(BATCHES[0], power_of_two_at_least(batch))


def stacked(tiles: list[Tile]) -> Tile:
    """The tiles as one whose fields are arrays, as `cost` takes it."""
    return type(tiles[0])(*[np.array(field).T for field in zip(*tiles, strict=True)])


def serve(tiles: list[Tile], clocks: np.ndarray) -> dict[int, Tile]:
    """{batch: tile}, from `clocks` [BATCHES, tiles]: the fewest tiles of which none is slower than SLACK allows."""
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
