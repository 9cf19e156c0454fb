"""Cost model of a convolution tile on a Hopper GPU, in clocks; `conv_tiles` chooses tiles by it.

A program's main loop is bound by the slowest of three, per 32 bytes of the reduction (16 channels in 16 bits):

    tensor cores     a wgmma of 64 x N takes N / 2 clocks
    shared memory    its operands take 16 + N / 4 clocks (128 bytes each), and TMA's writes pass through it too
    L2               (channels + pixels) * 32 bytes, at L2_BYTES per clock and SM

and by its dependency chain: if a product adds to the previous one's accumulator (rows that share their input), the
compiler waits for each, and only other warp groups of the SM keep the tensor cores busy meanwhile.

So large tiles are fast, until too few programs are left to fill the GPU evenly, or too few registers. Image rows that
share their input (`rows`) and channel blocks that share their pixels (`groups`) make tiles larger than one matrix
product; blocks of 2x2 pixels (`fold`) fill its rows if there are few channels. Zeros that TMA fills in count as reads.
The constants are assumptions until they are measured; only the order of the candidates depends on them. GPUs other
than Hopper's use the same rule, with the tensor-core and memory figures in `gpus`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rir_kernels.triton.tiling.gpus import Gpu
from rir_kernels.triton.tiling.tile import ConvConfig

L2_BYTES = 36  # per clock and SM, while all SMs read: 7.6 TB/s at 1.6 GHz
STORE_BYTES = 20  # the same for stores to memory: 4.3 TB/s
SLICE = 32  # bytes of the reduction in one wgmma
NARROW = 64  # bytes of a TMA box's row; narrower rows aren't cheaper
DRAIN = 80  # clocks from a wgmma's end until its warp group continues
STEP = 64  # clocks of overhead per step of the pipelined loop
START = 1600  # clocks until the first operands arrive


@dataclass(frozen=True)
class Problem:
    """One launch: an output of n x h x w pixels and c channels, k input channels, taps (rows, columns).

    padding: the convolution's at stride 1; None if the taps of neighbouring pixels do not overlap.
    planes: the number of outputs of that size that divide the taps among them: the data gradient's at stride 2.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    taps: tuple[int, int]
    itemsize: int
    padding: tuple[int, int] | None = None
    planes: int = 1

    @property
    def shares_rows(self) -> bool:
        """Whether neighbouring output rows read the same input rows."""
        return self.padding is not None and self.taps[0] > 1 and self.h > 1

    @property
    def has_border(self) -> bool:
        """Whether border pixels, and no others, have taps to skip: one row or column of taps each."""
        return self.padding == (1, 1) and self.taps == (3, 3) and min(self.h, self.w) > 1

    @property
    def folds(self) -> bool:
        """Whether it is a 3x3 whose output is whole blocks of 2x2 pixels."""
        return self.padding == (1, 1) and self.taps == (3, 3) and self.h % 2 == self.w % 2 == 0


def clocks(problem: Problem, tile: ConvConfig, gpu: Gpu) -> float:
    """Estimates the launch's time with that tile; infinite if the tile is too large for the GPU.

    Fields of the tile, and the problem's n, may be arrays; the result then has their broadcast shape.
    """
    p = problem
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    channels = tile.block_c * tile.groups

    # loads of one step of the loop
    boxes, columns, weights, rows = _operands(tile, p)
    by_row = tile.rows > 1
    products = np.where(tile.fold, 4, np.where(by_row, tile.rows * weights, 1))
    taps = np.where(by_row, p.taps[1], p.taps[0] * p.taps[1] / p.planes)
    steps_a_block = np.where(tile.fold, 4, taps)

    # with two warp groups, a product of 64 rows is split along its pixels
    width = columns / np.where(tile.block_c == 64, tile.num_warps // 4, 1)
    wgmmas = products * rows / 64 * (columns / width)
    blocks = cdiv(p.k, tile.block_k)
    slices = tile.block_k * p.itemsize / SLICE
    fetched = boxes * columns + weights * rows
    rate = gpu.architecture
    tensor = wgmmas * width / 2 * slices * blocks / rate.tensor
    shared = (wgmmas * (16 + width / 4) + fetched * SLICE / 128) * slices * blocks
    last = p.k - (blocks - 1) * tile.block_k
    box_bytes = sum(np.maximum(block * p.itemsize, NARROW) * n for block, n in ((tile.block_k, blocks - 1), (last, 1)))
    # pointers read weights without padding, and a folded tile reads only its nonzero weights
    weight_bytes = np.where(tile.fold, 9 / 16 * p.k * p.itemsize, box_bytes)
    l2 = (boxes * columns * box_bytes + weights * rows * weight_bytes) / L2_BYTES
    occupancy = residents(tile, p, gpu)
    a_product = rows / 64 / (tile.num_warps // 4) * width / 2 * slices
    waits = (products > 1) & (rate.product == "wgmma")
    chain = np.where(waits, products * (a_product + DRAIN) * blocks / occupancy, 0)
    loop = steps_a_block * (np.maximum.reduce(np.broadcast_arrays(tensor, shared, l2, chain)) + STEP * blocks)

    stored = np.minimum(channels, p.c) * pixels * tile.rows * p.itemsize
    rest = START + stored / (STORE_BYTES * rate.memory)
    programs = cdiv(p.n, tile.box[0]) * cdiv(p.h, tile.box[1] * tile.rows) * cdiv(p.w, tile.box[2])
    programs = programs * cdiv(p.c, channels) * p.planes
    turns = cdiv(programs, gpu.sms)
    # with `skips`, programs have 9, 6 and 4 taps, longest first: balanced except for a last one
    inner, edges = (p.h - 2) * (p.w - 2), 2 * (p.h - 2) + 2 * (p.w - 2)
    share = (9 * inner + 6 * edges + 4 * 4) / (9 * p.h * p.w)
    even = np.maximum(cdiv(programs * inner // (p.h * p.w), gpu.sms), programs * share / gpu.sms + 4 / 9)
    loops = np.where(tile.skips, even, turns)
    # prologue and epilogue of a program overlap the loop of another one on the same SM
    time = loops * loop + np.where(occupancy > 1, rest, turns * rest)
    fitting: Any = np.where(tile.num_stages * stage_bytes(tile, p) > gpu.shared_bytes, np.inf, time)
    return fitting[()]  # a scalar if all inputs were


def stage_bytes(tile: ConvConfig, problem: Problem) -> int:
    """Returns the bytes of shared memory of one pipeline stage."""
    boxes, columns, weights, rows = _operands(tile, problem)
    return (boxes * columns + weights * rows) * tile.block_k * problem.itemsize


def _operands(tile, problem):
    """Returns what a step of the loop loads: (boxes of x, their pixels, boxes of weights, their rows)."""
    fold, by_row = 1 * tile.fold, 1 * (tile.rows > 1)  # 0 or 1
    pixels = tile.box[0] * tile.box[1] * tile.box[2] // (1 + 3 * fold)
    boxes = 1 + 3 * fold + (tile.rows + problem.taps[0] - 2) * by_row
    weights = 1 + 3 * fold + (problem.taps[0] - 1) * by_row
    return boxes, pixels, weights, tile.block_c * tile.groups * (1 + 3 * fold)


def accumulators(tile: ConvConfig) -> float:
    """Returns the accumulator registers per thread."""
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    return tile.block_c * tile.groups * tile.rows * pixels / (32 * tile.num_warps)


def residents(tile: ConvConfig, problem: Problem, gpu: Gpu) -> int:
    """Returns how many programs are resident on one SM."""
    sums = accumulators(tile)
    registers = np.where(sums <= 64, 160, np.where(sums <= 96, 176, 255))  # as compiled, at most
    by_registers = 65536 // (32 * tile.num_warps * registers)
    by_memory = gpu.shared_bytes // (tile.num_stages * stage_bytes(tile, problem) + 1024)
    return np.maximum(1, np.minimum(by_registers, by_memory))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_at_least(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def power_of_two_dividing(n: int) -> int:
    return n & -n
