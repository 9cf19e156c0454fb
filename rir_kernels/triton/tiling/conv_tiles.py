"""Tile shapes by an analytic rule, a function only of shape, dtype and GPU: every process and rank chooses the same.

Boxes of pixels have power-of-two sides, and span several images if one image is too small. Among the tiles that compile
without spills (`gpus.Limits`, `python -m rir_kernels.triton.inspect`) the convolution takes the one that `conv_cost`
finds fastest. fp32 without TF32 has no tensor cores: its products are plain multiply-adds in registers, and larger
tiles spill.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from rir_kernels.common.tracing import no_replay
from rir_kernels.triton.tiling.batches import BATCHES, rounded, serve, stacked
from rir_kernels.triton.tiling.conv_cost import (
    Problem,
    accumulators,
    cdiv,
    clocks,
    power_of_two_at_least,
    power_of_two_dividing,
)
from rir_kernels.triton.tiling.gpus import H200, Gpu
from rir_kernels.triton.tiling.measured import measured_tile
from rir_kernels.triton.tiling.tile import ConvConfig

MAX_CHANNEL_BLOCK = 128


@dataclass(frozen=True)
class RowsConfig:
    """Tile of the normalization kernels, [block_m, block_c] of [M, C]; a reduction merges `steps` tiles per program."""

    block_m: int
    block_c: int
    steps: int
    num_warps: int


@functools.cache
def pixel_box(n: int, h: int, w: int, pixels: int) -> tuple[int, int, int]:
    """Returns the box of `pixels` output pixels (a power of two) that covers (n, h, w) with the fewest tiles.

    Prefers longer rows, then more rows: neighbouring pixels share the taps' input.
    """
    best: Any = None
    box_w = min(pixels, power_of_two_at_least(w))
    while box_w:
        box_h = min(pixels // box_w, power_of_two_at_least(h))
        while box_h:
            box = (pixels // (box_w * box_h), box_h, box_w)
            tiles = cdiv(n, box[0]) * cdiv(h, box[1]) * cdiv(w, box[2])
            if box[0] <= 256 and (best is None or tiles < best[0]):
                best = (tiles, box)
            box_h //= 2
        box_w //= 2
    return best[1]


def row_box(n: int, w: int, pixels: int) -> tuple[int, int, int]:
    """Returns the box of one row that covers (n, w) with the fewest tiles."""
    widths = [1 << i for i in range(power_of_two_at_least(w).bit_length()) if 1 << i <= pixels <= 256 << i]
    width = min(reversed(widths), key=lambda width: cdiv(n, pixels // width) * cdiv(w, width))
    return pixels // width, 1, width


_forced: ContextVar[ConvConfig | None] = ContextVar("forced", default=None)


def use_tile(tile: ConvConfig) -> contextlib.AbstractContextManager[None]:
    """Makes every convolution of this thread take that tile, for measurements and tests."""
    return forced(_forced, tile)


@contextlib.contextmanager
def forced(variable: ContextVar, tile) -> Iterator[None]:
    """Sets the variable to the tile and disables plan replay."""
    token = variable.set(tile)
    try:
        with no_replay():
            yield
    finally:
        variable.reset(token)


def conv_config(problem: Problem, tensor_cores: bool, gpu: Gpu = H200) -> ConvConfig:
    """Returns the forced tile, else the one measured on this GPU, else the rule's."""
    tile = _forced.get()
    if tile is None:
        return _chosen(problem, tensor_cores, gpu)
    rows = tile.rows if problem.shares_rows else 1
    return tile._replace(rows=rows, skips=tile.skips and problem.has_border, fold=tile.fold and problem.folds)


def is_forced() -> bool:
    """Whether `use_tile` sets the tile."""
    return _forced.get() is not None


@functools.cache
def _chosen(problem, tensor_cores, gpu):
    if not tensor_cores:
        return tiles_for(dataclasses.replace(problem, n=rounded(problem.n)), False, gpu)[0][1]
    return measured_tile(problem, gpu) or _by_batch(dataclasses.replace(problem, n=0), gpu)[rounded(problem.n)]


@functools.cache
def _by_batch(problem, gpu):
    return serve(*_timed(problem, BATCHES, gpu))


def tiles_for(problem: Problem, tensor_cores: bool, gpu: Gpu = H200) -> list[tuple[float, ConvConfig]]:
    """Returns (clocks, tile) of all allowed tiles that fit the GPU, cheapest first; if equal, the simpler one."""
    if not tensor_cores:
        most = max(16, min(64, power_of_two_at_least(problem.n * problem.h * problem.w)))
        boxes = [pixel_box(problem.n, problem.h, problem.w, pixels) for pixels in (64, 32, 16) if pixels <= most]
        return [(0.0, ConvConfig(box, block_c=64, block_k=16, num_warps=8, num_stages=2)) for box in boxes]
    tiles, (times,) = _timed(problem, (problem.n,), gpu)
    return [(float(times[i]), tiles[i]) for i in np.argsort(times, kind="stable") if np.isfinite(times[i])]


def ranked_tiles(problem: Problem, gpu: Gpu = H200) -> list[tuple[float, ConvConfig]]:
    """Returns `tiles_for` a problem on tensor cores."""
    return tiles_for(problem, True, gpu)


def _timed(problem, batches, gpu):
    """Returns the candidate tiles for any of the batches, simple ones first, and their clocks [batches, tiles]."""
    tiles = list(_candidates(problem, batches, gpu))
    of_batches = dataclasses.replace(problem, n=np.array(batches)[:, None])
    return tiles, clocks(of_batches, stacked(tiles), gpu)


def holds_upstream(tile: ConvConfig, itemsize: int, gpu: Gpu = H200) -> bool:
    """Whether a thread's registers hold the z of the layer upstream and the tile's accumulators, as compiled."""
    limits = gpu.limits
    most = limits.sums_beside_upstream if itemsize == 2 else min(limits.sums_beside_upstream, limits.sums_of_rows)
    return accumulators(tile) <= (limits.sums_folded if tile.fold else most)


def _candidates(problem, batches, gpu):
    limits = gpu.limits
    widest = max(16, 128 // problem.itemsize)
    blocks_k = [k for k in (64, 32, 16) if k <= min(widest, limits.block_k, max(16, power_of_two_at_least(problem.k)))]
    yield from _folded(problem, batches, blocks_k, limits.sums_folded)
    for rows in (1, 2, 4) if problem.shares_rows else (1,):
        if rows > limits.rows:
            continue
        for pixels in (16, 32, 64, 128, 256):
            if pixels > limits.pixels:
                break
            skipping = limits.skips and rows == 1 and problem.has_border and pixels <= max(batches)
            for block_c, num_warps in ((64, 4), (128, 8), (64, 8)):
                for groups in (1, 2, 3) if rows == 1 and limits.groups else (1,):
                    # two warp groups share a block of 64 channels well only if they don't share rows
                    if block_c * (groups - 1) >= problem.c or (rows > 1 and (block_c, num_warps) == (64, 8)):
                        continue
                    sums = block_c * groups * rows * pixels / (32 * num_warps)
                    if sums > (limits.sums if rows == 1 else limits.sums_of_rows):
                        continue
                    for block_k in blocks_k:
                        for stages in (4, 3):
                            shape = block_c, block_k, num_warps, stages, groups, rows
                            for box in _boxes(problem, batches, pixels, rows):
                                yield ConvConfig(box, *shape)
                            if skipping and sums <= limits.sums_of_rows:
                                yield ConvConfig((pixels, 1, 1), *shape, skips=True)


def _folded(problem, batches, blocks_k, max_sums):
    """Yields tiles of blocks of 2x2 pixels, if there are few enough channels."""
    if not problem.folds or problem.c > 32:
        return
    halved = dataclasses.replace(problem, h=problem.h // 2, w=problem.w // 2)
    for blocks in (64, 128):
        for box_n, box_h, box_w in _boxes(halved, batches, blocks):
            box = box_n, 2 * box_h, 2 * box_w
            for block_c, num_warps in ((16, 4), (32, 4), (32, 8)):
                for block_k in blocks_k:
                    for stages in (3, 2):
                        tile = ConvConfig(box, block_c, block_k, num_warps, stages, fold=True)
                        if max(box) <= 256 and accumulators(tile) <= max_sums:
                            yield tile


def _boxes(problem, batches, pixels, rows=1):
    """Returns the boxes of that many pixels that waste the fewest at some batch."""
    if rows > 1:
        return dict.fromkeys(row_box(n, problem.w, pixels) for n in batches)
    return dict.fromkeys(pixel_box(n, problem.h, problem.w, pixels) for n in batches)


ROWS_TILE = 4096  # elements
REDUCTION_PROGRAMS = 528


def rows_config(m: int, c: int) -> RowsConfig:
    """Returns the tile for a pass over [m, c]."""
    divisor = power_of_two_dividing(c)
    block_c = min(MAX_CHANNEL_BLOCK, divisor if divisor >= 16 else power_of_two_at_least(c))
    block_m = ROWS_TILE // block_c
    splits = max(1, REDUCTION_PROGRAMS // cdiv(c, block_c))
    steps = cdiv(cdiv(m, block_m), splits)
    return RowsConfig(block_m, block_c, steps, num_warps=4)
