"""Falls back to a smaller tile if a kernel exceeds the GPU's resources, and remembers it.

The rule estimates what a tile needs, and its choice fits by that estimate. If a kernel needs more, Triton raises
OutOfResources before it launches. The fallback then reduces the tile's stages or, if it has none to spare, takes the
cheapest tile whose estimate is lower by the excess. Every process on such a GPU takes the same steps.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from triton.runtime.errors import OutOfResources

Result = TypeVar("Result")
LEAST_STAGES = 2

_kept: dict[Hashable, Any] = {}  # launch: the tile it fell back to
_warned = False


def with_tile_fallback(
    launch: Hashable,
    kernel: str,
    tile,
    attempt: Callable[..., Result],
    *,
    needs: Callable[..., int],
    ranked: Callable[[], list] | None,
) -> Result:
    """Returns attempt(tile) with the first tile that fits the GPU.

    launch: what is launched, on which GPU: the key under which the fallback is remembered.
    needs: estimates a tile's shared memory. ranked: returns (cost, tile) of the others; None: no other may be taken.
    Raises OutOfResources if there is no smaller one.
    """
    if ranked is None:
        return attempt(tile)
    tile = _kept.get(launch, tile)
    while True:
        try:
            return attempt(tile)
        except OutOfResources as error:
            below = _next_below(tile, error, needs, ranked())
            if below is None:
                raise
            _warn(kernel, error)
            tile = _kept[launch] = below


def _next_below(tile, error, needs, ranked):
    most = min(needs(tile) * error.limit // error.required, needs(tile) - 1)
    fewer = [tile._replace(num_stages=stages) for stages in range(tile.num_stages - 1, LEAST_STAGES - 1, -1)]
    return next((below for below in (*fewer, *(other for _, other in ranked)) if needs(below) <= most), None)


def _warn(kernel, error):
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"rir_kernels: {kernel} needs {error.required} of {error.name}, and this GPU has {error.limit}: a smaller "
            "tile is taken, here and silently wherever else it may be needed. Results are the same but for the order "
            "of sums; the speed may not be",
            RuntimeWarning,
            stacklevel=2,
        )
