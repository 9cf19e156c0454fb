"""What a tile of the convolution costs on a Hopper GPU, in clocks: the rule by which `config` chooses.

A program's main loop is bound by the slowest of three, per 32 bytes of the reduction (16 channels in 16 bits):

    tensor cores     a wgmma of 64 x N takes N / 2 clocks
    shared memory    its operands take 16 + N / 4 clocks (128 bytes each), and what TMA writes passes there too
    L2               (channels + pixels) * 32 bytes, at L2_BYTES a clock for each of the SMs

and by its own chain of products: where one adds to what the one before it sums (rows that share their input), the
compiler waits for each, and only other warp groups of the SM keep the tensor cores busy meanwhile.

So large tiles are fast, until too few programs are left to fill the GPU evenly, or too few registers. Rows of the
image that share their input (`rows`) and channels that share their pixels (`groups`) make tiles larger than one matrix
product; blocks of 2x2 pixels (`fold`) fill its rows where the channels are few. What TMA fills with zeros counts as if
it were read. The constants are assumptions until they are measured; only the order of the candidates depends on them.
Other GPUs than Hopper's take the same rule, with what `gpus` says of their tensor cores and memory.
"""

from dataclasses import dataclass

from rir_kernels.triton.gpus import Gpu
from rir_kernels.triton.tile import ConvConfig

L2_BYTES = 36  # a clock and SM, while all of them read: 7.6 TB/s at 1.6 GHz
STORE_BYTES = 20  # likewise to memory: 4.3 TB/s
SLICE = 32  # bytes of the reduction in one wgmma
NARROW = 64  # bytes of a TMA box's rows below which they do not get cheaper
DRAIN = 80  # clocks from a wgmma's end to where its warp group goes on
STEP = 64  # clocks to turn the pipelined loop around
START = 1600  # clocks until the first operands are there


@dataclass(frozen=True)
class Problem:
    """One launch: an output of n x h x w pixels and c channels, k input channels, taps (rows, columns).

    padding: at stride 1 the convolution's; None where the taps of neighbouring pixels do not overlap.
    planes: of so many outputs of that size, which have the taps between them: the data gradient's at stride 2.
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
        """Whether neighbouring output rows read the same rows of the input."""
        return self.padding is not None and self.taps[0] > 1 and self.h > 1

    @property
    def has_border(self) -> bool:
        """Whether the pixels at the border, and they alone, have taps to skip: one row or column of them each."""
        return self.padding == (1, 1) and self.taps == (3, 3) and min(self.h, self.w) > 1

    @property
    def folds(self) -> bool:
        """Whether it is a 3x3 whose output is whole blocks of 2x2 pixels."""
        return self.padding == (1, 1) and self.taps == (3, 3) and self.h % 2 == self.w % 2 == 0


def clocks(problem: Problem, tile: ConvConfig, gpu: Gpu) -> float | None:
    """The launch's time with that tile, None where the tile is too large for the GPU."""
    p = problem
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    channels = tile.block_c * tile.groups
    if tile.num_stages * stage_bytes(tile, p) > gpu.shared_bytes:
        return None

    # in one step of the loop
    boxes, columns, weights, rows = _operands(tile, p)
    if tile.fold:
        products, steps_a_block = 4, 4
    elif tile.rows > 1:
        products, steps_a_block = tile.rows * weights, p.taps[1]
    else:
        products, steps_a_block = 1, p.taps[0] * p.taps[1] / p.planes

    # a product of 64 rows is split along its pixels where there are two warp groups
    split = tile.num_warps // 4 if tile.block_c == 64 else 1
    width = columns / split
    wgmmas = products * split * rows / 64
    blocks = cdiv(p.k, tile.block_k)
    slices = tile.block_k * p.itemsize / SLICE
    fetched = boxes * columns + weights * rows
    rate = gpu.architecture
    tensor = wgmmas * width / 2 * slices * blocks / rate.tensor
    shared = (wgmmas * (16 + width / 4) + fetched * SLICE / 128) * slices * blocks
    row_bytes = [min(tile.block_k, p.k - block * tile.block_k) * p.itemsize for block in range(blocks)]
    box_bytes = sum(max(size, NARROW) for size in row_bytes)
    # pointers read weights as they are, and of a folded tile's only those that are not zero
    weight_bytes = 9 / 16 * sum(row_bytes) if tile.fold else box_bytes
    l2 = (boxes * columns * box_bytes + weights * rows * weight_bytes) / L2_BYTES
    occupancy = residents(tile, p, gpu)
    chain = 0.0
    if products > 1 and rate.product == "wgmma":
        a_product = rows / 64 / (tile.num_warps // 4) * width / 2 * slices
        chain = products * (a_product + DRAIN) * blocks / occupancy
    loop = steps_a_block * (max(tensor, shared, l2, chain) + STEP * blocks)

    stored = min(channels, p.c) * pixels * tile.rows * p.itemsize
    rest = START + stored / (STORE_BYTES * rate.memory)
    programs = cdiv(p.n, tile.box[0]) * cdiv(p.h, tile.box[1] * tile.rows) * cdiv(p.w, tile.box[2])
    programs *= cdiv(p.c, channels) * p.planes
    turns = cdiv(programs, gpu.sms)
    if tile.skips:
        # programs of 9, 6 and 4 taps, longest first: as even as it gets, but for a last one
        inner, edges = (p.h - 2) * (p.w - 2), 2 * (p.h - 2) + 2 * (p.w - 2)
        taps = (9 * inner + 6 * edges + 4 * 4) / (9 * p.h * p.w)
        loops = max(cdiv(programs * inner // (p.h * p.w), gpu.sms), programs * taps / gpu.sms + 4 / 9)
    else:
        loops = turns
    # the ends of one program hide behind the loop of another on the same SM
    return loops * loop + (rest if occupancy > 1 else turns * rest)


def stage_bytes(tile: ConvConfig, problem: Problem) -> int:
    """Shared memory of one stage of the pipeline."""
    boxes, columns, weights, rows = _operands(tile, problem)
    return (boxes * columns + weights * rows) * tile.block_k * problem.itemsize


def _operands(tile, problem):
    """What a step of the loop loads: (boxes of x, their pixels, boxes of weights, their rows)."""
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    channels = tile.block_c * tile.groups
    if tile.fold:
        return 4, pixels // 4, 4, 4 * channels
    if tile.rows > 1:
        return tile.rows + problem.taps[0] - 1, pixels, problem.taps[0], channels
    return 1, pixels, 1, channels


def accumulators(tile: ConvConfig) -> float:
    """Registers of a thread that hold sums."""
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    return tile.block_c * tile.groups * tile.rows * pixels / (32 * tile.num_warps)


def residents(tile: ConvConfig, problem: Problem, gpu: Gpu) -> int:
    """Programs that one SM holds at a time."""
    sums = accumulators(tile)
    registers = 160 if sums <= 64 else 176 if sums <= 96 else 255  # as compiled, at most
    by_registers = 65536 // (32 * tile.num_warps * registers)
    return max(1, min(by_registers, gpu.shared_bytes // (tile.num_stages * stage_bytes(tile, problem) + 1024)))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_at_least(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def power_of_two_dividing(n: int) -> int:
    return n & -n
