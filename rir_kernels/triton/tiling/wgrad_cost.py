"""Cost model of a weight-gradient tile, in clocks as in `conv_cost`, and the split of its pixels among programs.

A tile is bound by the slowest of

    tensor cores     a wgmma of 64 x N takes N / 2 clocks
    shared memory    its operands take 16 + N / 4 clocks, and TMA's writes pass through it too
    L2, memory       what the tiles load, and the two tensors once
    dependency       rows that share their input add to the same accumulators: the compiler waits for each product

There is one program per resident slot of the GPU, and their lengths differ by at most one tile. At the end each program
writes its sums, and a second launch reads them all: this is what large tiles, and many programs, cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rir_kernels.triton.tiling.conv_cost import (
    DRAIN,
    L2_BYTES,
    SLICE,
    START,
    STEP,
    STORE_BYTES,
    cdiv,
    power_of_two_at_least,
    power_of_two_dividing,
)
from rir_kernels.triton.tiling.gpus import Gpu

LAUNCH = 1600  # clocks until another launch has started
LATENCY = 1000  # clocks of a load
RESTART = 800  # clocks until the pipeline of the next position is full
OTHER_REGISTERS = 72  # at most, in addition to the accumulators: as compiled
OTHER_REGISTERS_OF_ROWS = 80  # the same for seven rows


@dataclass(frozen=True)
class WgradProblem:
    """One weight gradient: dz has n x h x w pixels and c_out channels, x has c_in channels.

    shares_rows: whether neighbouring rows of dz meet the same rows of x.
    has_border: whether the outer columns of the kernel meet only padding in one column of pixels each.
    packs: whether adjacent pixels of a row may be treated as channels of one pixel.
    """

    n: int
    h: int
    w: int
    c_out: int
    c_in: int
    kernel: tuple[int, int]
    padding_w: int
    itemsize: int
    tensor_cores: bool
    shares_rows: bool
    has_border: bool
    packs: bool


class WgradTile(NamedTuple):
    """Tile of the weight-gradient kernel, in packs of `pack` pixels; `kernels.wgrad` explains the rest."""

    walk: str
    box: tuple[int, int, int]
    rows: int
    block_co: int
    block_ci: int
    num_warps: int
    num_stages: int
    pack: int = 1
    skips: bool = False


@dataclass(frozen=True)
class Split:
    """How the tiles of all positions are distributed to the programs."""

    positions: int
    tiles: int  # per position in the middle column of the kernel
    edge_tiles: int  # per other position
    total: int  # tiles of all positions
    share: int  # tiles per program

    @property
    def programs(self) -> int:
        return cdiv(self.total, self.share)

    @property
    def is_even(self) -> bool:
        """Whether no program has tiles of two positions."""
        return (self.tiles % self.share == 0) & (self.edge_tiles % self.share == 0)

    @property
    def slots(self) -> int:
        """Returns the largest number of programs of a position."""
        return self.tiles // self.share if self.is_even else cdiv(self.share - 1 + self.tiles, self.share)

    @property
    def parts(self) -> int:
        """Sums the programs of all positions; a program with tiles of two positions counts twice."""
        return self.programs + (self.positions - 1) * (1 - self.is_even)


def split(problem: WgradProblem, tile: WgradTile, gpu: Gpu) -> Split:
    """Splits the tiles among at most one program per resident slot of the GPU."""
    blocks = cdiv(problem.c_out * tile.pack, tile.block_co) * cdiv(problem.c_in * tile.pack, tile.block_ci)
    columns = packed_columns(problem, tile.pack)
    n, h, w = tiles(problem, tile)
    edge_tiles = n * h * (w - tile.skips)
    total = blocks * (n * h * w + (columns - 1) * edge_tiles)
    places = gpu.sms * residents(problem, tile, gpu)
    return Split(blocks * columns, n * h * w, edge_tiles, total, cdiv(total, places))


def can_skip(problem: WgradProblem, walk: str, pack: int) -> bool:
    """Whether pixels that meet only padding can be omitted; a tile then lies in one column of pixels."""
    return problem.has_border and walk == "images" and problem.w > pack


def packed_columns(problem: WgradProblem, pack: int) -> int:
    """Counts the kernel columns between packs: tap j of pixel a is floor((a + j - padding) / pack) packs away."""
    last = (pack - 1 + problem.kernel[1] - 1 - problem.padding_w) // pack
    return last + packed_padding(problem, pack) + 1


def packed_padding(problem: WgradProblem, pack: int) -> int:
    return cdiv(problem.padding_w, pack)


def tiles(problem: WgradProblem, tile: WgradTile) -> tuple[int, int, int]:
    """Counts the tiles along N, H and W."""
    n, h, w = tile.box
    return cdiv(problem.n, n), cdiv(problem.h, h * tile.rows), cdiv(problem.w // tile.pack, w)


def walks(problem: WgradProblem, pack: int, pixels: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields (walk, box) for tiles of dz of that many pixels that a box with leading ones can read."""
    n, h, w = problem.n, problem.h, problem.w // pack
    if w == power_of_two_dividing(w) and w <= pixels:
        box_h = min(pixels // w, power_of_two_dividing(h))
        box_n = pixels // (w * box_h)
        # several images only if a box has whole images, which are consecutive rows
        if box_n == 1 or box_h == h:
            yield "rows", (box_n, box_h, w)
    if pixels <= max(16, power_of_two_at_least(n)):
        yield "images", (pixels, 1, 1)
    if pixels <= max(16, power_of_two_at_least(w)):
        yield "row", (1, 1, pixels)


def clocks(problem: WgradProblem, tile: WgradTile, gpu: Gpu) -> float:
    """Estimates both launches' time; as in `conv_cost`, fields of the tile and the problem's n may be arrays."""
    busy, alone = _step_clocks(problem, tile, gpu)
    together, cut = residents(problem, tile, gpu), split(problem, tile, gpu)
    ends = 1 + cdiv(cut.share, cut.tiles) * (1 - cut.is_even)  # positions per program
    steps = np.maximum(together * cut.share * busy, cut.share * alone + (ends - 1) * RESTART)
    tensors = problem.n * problem.h * problem.w * (problem.c_out + problem.c_in) * problem.itemsize
    stored = STORE_BYTES * gpu.architecture.memory
    loop = np.maximum(steps, tensors / (stored * gpu.sms))
    c_out, c_in = _real_blocks(problem, tile)
    sums = problem.kernel[0] * c_out * c_in * 4  # bytes that a program writes at the end of a position
    first = START + loop + together * ends * sums / stored
    time = first + LAUNCH + START + cut.parts * sums / (stored * gpu.sms)
    fitting: Any = np.where(shared_bytes(problem, tile) > gpu.shared_bytes, np.inf, time)
    return fitting[()]  # a scalar if all inputs were


def _step_clocks(problem, tile, gpu):
    """Returns the clocks of a step of the loop: (with several programs on the SM, with only one)."""
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    boxes = _x_boxes(problem, tile)
    slices = pixels * problem.itemsize / SLICE
    halves = problem.kernel[0] * tile.rows * tile.block_co / 64  # matrix products of 64 rows
    tensor = halves * tile.block_ci / 2 * slices / gpu.architecture.tensor
    written = tile.rows * tile.block_co + boxes * tile.block_ci  # channels
    shared = (halves * (16 + tile.block_ci / 4) + written * SLICE / 128) * slices
    c_out, c_in = _real_blocks(problem, tile)
    l2 = (tile.rows * c_out + boxes * c_in) * problem.itemsize * pixels / L2_BYTES
    busy = np.maximum(np.maximum(tensor, shared), l2)

    waits = problem.kernel[0] * (tile.rows - 1) if gpu.architecture.product == "wgmma" else 0
    alone = np.maximum(busy, tensor / (tile.num_warps // 4) + waits * DRAIN) + STEP
    # a load is issued once all but the last row's products are done, and is needed num_stages - 1 steps later
    late = LATENCY + l2 - tensor / tile.rows
    ahead = np.maximum(tile.num_stages - 2, 1)
    return busy, np.where(tile.num_stages == 2, alone + np.maximum(0, late), np.maximum(alone, late / ahead))


def _real_blocks(problem, tile):
    """Returns the average number of real, not padded, channels per block: (of dz, of x)."""
    c_out, c_in = problem.c_out * tile.pack, problem.c_in * tile.pack
    return c_out / cdiv(c_out, tile.block_co), c_in / cdiv(c_in, tile.block_ci)


def _x_boxes(problem, tile):
    return tile.rows + problem.kernel[0] - 1 if problem.shares_rows else problem.kernel[0]


def accumulators(problem: WgradProblem, tile: WgradTile) -> int:
    """Returns the accumulator registers per thread."""
    return problem.kernel[0] * tile.block_co * tile.block_ci // (32 * tile.num_warps)


def shared_bytes(problem: WgradProblem, tile: WgradTile) -> int:
    """Returns a program's bytes of shared memory: the pipeline's stages, and a few barriers."""
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    channels = tile.rows * tile.block_co + _x_boxes(problem, tile) * tile.block_ci
    return tile.num_stages * pixels * channels * problem.itemsize + 1024


def residents(problem: WgradProblem, tile: WgradTile, gpu: Gpu) -> int:
    """Returns how many programs are resident on one SM."""
    other = np.where(tile.rows <= 4, OTHER_REGISTERS, OTHER_REGISTERS_OF_ROWS)
    registers = np.minimum(255, accumulators(problem, tile) + other)
    by_registers = 65536 // (32 * tile.num_warps * registers)
    return np.maximum(1, np.minimum(by_registers, gpu.shared_bytes // shared_bytes(problem, tile)))
