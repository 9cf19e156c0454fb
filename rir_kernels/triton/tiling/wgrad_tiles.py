"""Chooses the weight gradient's tile: the one that `wgrad_cost` finds fastest, unless one was measured.

The choice depends only on shape, dtype and GPU, so every process and rank chooses, and rounds, the same. The candidates
are the tiles that compile without spills (`gpus.Limits`).
"""

import contextlib
import dataclasses
import functools
from contextvars import ContextVar
from math import prod

import numpy as np

from rir_kernels.triton.tiling.batches import BATCHES, rounded, serve, stacked
from rir_kernels.triton.tiling.conv_cost import power_of_two_at_least
from rir_kernels.triton.tiling.conv_tiles import forced
from rir_kernels.triton.tiling.gpus import H200, Gpu
from rir_kernels.triton.tiling.measured import measured_wgrad_tile
from rir_kernels.triton.tiling.wgrad_cost import WgradProblem, WgradTile, can_skip, clocks, tiles, walks

MAX_ROWS, MAX_STAGES = 2, 3  # with the most accumulators, or with tf32 operands

_forced: ContextVar[WgradTile | None] = ContextVar("forced", default=None)


def use_wgrad_tile(tile: WgradTile) -> contextlib.AbstractContextManager[None]:
    """Makes every weight gradient of this thread take that tile, for measurements and tests."""
    return forced(_forced, tile)


def wgrad_tile(problem: WgradProblem, gpu: Gpu = H200) -> WgradTile:
    """Returns the forced tile, else the one measured on this GPU, else the rule's."""
    tile = _forced.get()
    return _chosen(problem, gpu) if tile is None else _fitted(problem, tile)


def is_forced() -> bool:
    """Whether `use_wgrad_tile` sets the tile."""
    return _forced.get() is not None


def _fitted(problem, tile):
    """Returns the tile without the options that don't apply to the problem."""
    pack = tile.pack if problem.packs and problem.w % tile.pack == 0 else 1
    rows = tile.rows if problem.shares_rows else 1
    return tile._replace(pack=pack, rows=rows, skips=tile.skips and can_skip(problem, tile.walk, pack))


@functools.cache
def _chosen(problem, gpu):
    if not problem.tensor_cores:
        return _plain_tile(dataclasses.replace(problem, n=rounded(problem.n)))
    return measured_wgrad_tile(problem, gpu) or _by_batch(dataclasses.replace(problem, n=0), gpu)[rounded(problem.n)]


def _plain_tile(problem):
    """Returns the tile for plain multiply-adds, without tensor cores: the one that wastes the fewest pixels."""
    tile = WgradTile("", (1, 1, 1), rows=1, block_co=32, block_ci=32, num_warps=8, num_stages=2)
    ways = [tile._replace(walk=walk, box=box) for walk, box in walks(problem, 1, 16)]
    return min(ways, key=lambda tile: prod(tiles(problem, tile)))


@functools.cache
def _by_batch(problem, gpu):
    return serve(*_timed(problem, BATCHES, gpu))


def ranked_wgrad_tiles(problem: WgradProblem, gpu: Gpu = H200) -> list[tuple[float, WgradTile]]:
    """Returns (clocks, tile) of all tiles that fit the GPU, cheapest first; if equal, the simpler one."""
    if not problem.tensor_cores:
        return [(0.0, _plain_tile(problem))]
    candidates, (times,) = _timed(problem, (problem.n,), gpu)
    return [(float(times[i]), candidates[i]) for i in np.argsort(times, kind="stable") if np.isfinite(times[i])]


def _timed(problem, batches, gpu):
    """Returns the candidate tiles for any of the batches, simple ones first, and their clocks [batches, tiles]."""
    candidates = list(_candidates(dataclasses.replace(problem, n=max(batches)), gpu))
    of_batches = dataclasses.replace(problem, n=np.array(batches)[:, None])
    return candidates, clocks(of_batches, stacked(candidates), gpu)


ROWS = (1, 2, 4, 7)


def _candidates(problem, gpu):
    limits = gpu.limits
    for pack in (1, 2, 4) if problem.packs else (1,):
        if problem.w % pack or (pack > 1 and pack * max(problem.c_out, problem.c_in) > 128):
            continue
        for rows in ROWS if problem.shares_rows else (1,):
            if rows > min(problem.h, limits.wgrad_rows) or (rows > MAX_ROWS and problem.itemsize == 4):
                continue
            for pixels in (16, 32, 64, 128):
                for walk, box in walks(problem, pack, pixels):
                    if walk == "rows" and rows > 1:
                        continue
                    skips = can_skip(problem, walk, pack)
                    for block_co, block_ci, num_warps in _blocks(problem, pack, rows, limits):
                        sums = problem.kernel[0] * block_co * block_ci // (32 * num_warps)
                        for num_stages in (4, 3, 2):
                            if num_stages <= MAX_STAGES or sums <= limits.wgrad_sums // 2:
                                shape = rows, block_co, block_ci, num_warps, num_stages, pack, skips
                                yield WgradTile(walk, box, *shape)


def _blocks(problem, pack, rows, limits):
    """Yields blocks of channels with their warps."""
    # tf32 operands pass through registers, and parity planes need registers for addresses
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
