"""The weight gradient's tile: the one that `wgrad_cost` finds fastest, unless one was measured.

A function of shape, dtype and GPU alone, so every process and rank chooses, and rounds, the same. The candidates are
the tiles that compile without spills (`gpus.Limits`).
"""

import contextlib
import dataclasses
import functools
from contextvars import ContextVar
from math import prod

from rir_kernels.triton.config import forced
from rir_kernels.triton.cost import power_of_two_at_least
from rir_kernels.triton.gpus import H200, Gpu
from rir_kernels.triton.measured import measured_wgrad_tile
from rir_kernels.triton.wgrad_cost import (
    WgradProblem,
    WgradTile,
    accumulators,
    can_skip,
    launches_clocks,
    shared_bytes,
    step_clocks,
    tiles,
    walks,
)

MAX_ROWS, MAX_STAGES = 2, 3  # beside the most sums, or operands of tf32

_forced: ContextVar[WgradTile | None] = ContextVar("forced", default=None)


def use_wgrad_tile(tile: WgradTile) -> contextlib.AbstractContextManager[None]:
    """Within it every weight gradient of this thread takes that tile: to measure it, and to test it."""
    return forced(_forced, tile)


def wgrad_tile(problem: WgradProblem, gpu: Gpu = H200) -> WgradTile:
    """The tile: the one that is forced, or was measured on this GPU, or that the rule finds."""
    tile = _forced.get()
    return _chosen(problem, gpu) if tile is None else _fitted(problem, tile)


def is_forced() -> bool:
    """Whether `use_wgrad_tile` names the tile."""
    return _forced.get() is not None


def _fitted(problem, tile):
    """The tile without what the problem does not have."""
    pack = tile.pack if problem.packs and problem.w % tile.pack == 0 else 1
    rows = tile.rows if problem.shares_rows else 1
    return dataclasses.replace(tile, pack=pack, rows=rows, skips=tile.skips and can_skip(problem, tile.walk, pack))


@functools.cache
def _chosen(problem, gpu):
    return measured_wgrad_tile(problem, gpu) or ranked_wgrad_tiles(problem, gpu)[0][1]


def ranked_wgrad_tiles(problem: WgradProblem, gpu: Gpu = H200) -> list[tuple[float, WgradTile]]:
    """(clocks, tile) of all that fit the GPU, the cheapest first; where the cost is the same, the simpler one."""
    timed = (_in_best_steps(problem, tile, gpu) for tile in _candidates(problem, gpu))
    return sorted(((time, tile) for time, tile in timed if shared_bytes(problem, tile) <= gpu.shared_bytes), key=_first)


def _in_best_steps(problem, tile, gpu):
    step = step_clocks(problem, tile, gpu)
    same = (dataclasses.replace(tile, steps=steps) for steps in STEPS)
    return min(((launches_clocks(problem, tile, gpu, *step), tile) for tile in same), key=_first)


def _first(pair):
    return pair[0]


# of a unit: few, for each is a kernel of its own
STEPS = tuple(steps << octave for octave in range(6) for steps in (4, 5, 6, 7))
ROWS = (1, 2, 4, 7)


def _candidates(problem, gpu):
    """Tiles worth a thought, simple ones first; of as yet no steps."""
    if not problem.tensor_cores:
        walk, box = _best_walk(problem, 1, 16, 1)
        yield WgradTile(walk, box, 1, 0, block_co=32, block_ci=32, num_warps=8, num_stages=2)
        return
    limits = gpu.limits
    for pack in (1, 2, 4) if problem.packs else (1,):
        if problem.w % pack or (pack > 1 and pack * max(problem.c_out, problem.c_in) > 128):
            continue
        for rows in ROWS if problem.shares_rows else (1,):
            if rows > min(problem.h, limits.wgrad_rows) or (rows > MAX_ROWS and problem.itemsize == 4):
                continue
            for pixels in (16, 32, 64, 128):
                if walk := _best_walk(problem, pack, pixels, rows):
                    for block_co, block_ci, num_warps in _blocks(problem, pack, rows, limits):
                        for num_stages in (4, 3, 2):
                            tile = WgradTile(walk[0], walk[1], rows, 0, block_co, block_ci, num_warps, num_stages, pack)
                            if num_stages <= MAX_STAGES or accumulators(problem, tile) <= limits.wgrad_sums // 2:
                                yield tile
                                if can_skip(problem, walk[0], pack):
                                    yield dataclasses.replace(tile, skips=True)


def _blocks(problem, pack, rows, limits):
    """Blocks of channels, by warps."""
    # operands of tf32 pass through registers, and parity planes have addresses there
    most = (
        limits.wgrad_sums
        if problem.itemsize == 2 and problem.shares_rows and rows <= MAX_ROWS
        else limits.wgrad_sums // 2
    )
    widest = max(16, power_of_two_at_least(problem.c_in * pack))
    for block_co, num_warps in ((64, 4), (128, 8)):
        if num_warps > limits.wgrad_warps:
            continue
        for block_ci in (16, 32, 64, 128):
            if block_ci <= widest and problem.kernel[0] * block_co * block_ci // (32 * num_warps) <= most:
                yield block_co, block_ci, num_warps


def _best_walk(problem, pack, pixels, rows):
    """The way to cut dz into tiles that wastes the fewest pixels: (walk, box), None where all are too large."""
    ways = [way for way in walks(problem, pack, pixels) if rows == 1 or way[0] != "rows"]
    return min(
        ways, key=lambda way: prod(tiles(problem, WgradTile(way[0], way[1], rows, 0, 0, 0, 0, 0, pack))), default=None
    )
