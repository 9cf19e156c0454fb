"""Tile shapes by an analytic rule: functions of shape and dtype alone, so every process and rank chooses the same.

The rule gives the tiles that were compiled for sm_90 and read (`python -m rir_kernels.triton.inspect`): pixels are
cut by powers of two that divide the image, taken from further images where one image is too small. fp32 without TF32
has no tensor cores: its products are plain multiply-adds in registers, and larger tiles spill.
"""

from dataclasses import dataclass

MAX_CHANNEL_BLOCK = 128


@dataclass(frozen=True)
class ConvConfig:
    """Tile of the forward and data-gradient kernel: `box` = (images, rows, columns) of output pixels."""

    box: tuple[int, int, int]
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WgradConfig:
    """Tile of the weight-gradient kernel; `walk` is explained in `rir_kernels.triton.wgrad`."""

    walk: str
    box: tuple[int, int, int]
    steps: int
    block_co: int
    block_ci: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowsConfig:
    """Tile of the normalization kernels, [block_m, block_c] of [M, C]; a reduction merges `steps` tiles a program."""

    block_m: int
    block_c: int
    steps: int
    num_warps: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_at_least(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def power_of_two_dividing(n: int) -> int:
    return n & -n


def pixel_box(n: int, h: int, w: int, pixels: int) -> tuple[int, int, int]:
    """The box of `pixels` output pixels (a power of two) that covers (n, h, w) with the fewest tiles.

    Among equals the one with the longest rows, then the most rows: neighbouring pixels share the taps' input.
    """
    best = None
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


def channel_block(c: int) -> int:
    """Output channels are the rows of the matrix product, which wgmma takes 64 at a time."""
    return min((128, 64), key=lambda block: cdiv(c, block) * block)


def reduction_block(k: int, itemsize: int) -> int:
    """Channels a step: the most that divide k, up to the 128 bytes of the widest shared-memory swizzle."""
    return max(16, min(128 // itemsize, power_of_two_dividing(k)))


def conv_config(n: int, h: int, w: int, c: int, k: int, itemsize: int, tensor_cores: bool) -> ConvConfig:
    """For an output of n x h x w pixels and c channels, and k input channels."""
    pixels = max(16, min(128 if tensor_cores else 64, power_of_two_at_least(n * h * w)))
    if not tensor_cores:
        return ConvConfig(pixel_box(n, h, w, pixels), block_c=64, block_k=16, num_warps=8, num_stages=2)
    block_c = channel_block(c)
    return ConvConfig(
        box=pixel_box(n, h, w, pixels),
        block_c=block_c,
        block_k=reduction_block(k, itemsize),
        num_warps=8 if block_c == 128 else 4,
        num_stages=4,
    )


# programs a weight gradient is cut into: two waves of the largest GPU it was written for
WGRAD_PROGRAMS = 264


def wgrad_config(
    n: int, h: int, w: int, c_out: int, c_in: int, tap_rows: int, itemsize: int, tensor_cores: bool
) -> WgradConfig:
    """For dz of n x h x w pixels and c_out channels, x of c_in channels, `tap_rows` kernel rows in the launch."""
    pixels = (64 if itemsize == 2 else 32) if tensor_cores else 16
    walk, box, tiles = min(_walks(n, h, w, pixels), key=lambda choice: choice[2])
    block_co = channel_block(c_out) if tensor_cores else 32
    block_ci = min(64 if tensor_cores else 32, max(16, power_of_two_at_least(c_in)))
    programs = cdiv(c_out, block_co) * cdiv(c_in, block_ci) * tap_rows
    splits = max(1, WGRAD_PROGRAMS // programs)
    steps = power_of_two_at_least(cdiv(tiles, splits))
    if not tensor_cores:
        return WgradConfig(walk, box, steps, block_co, block_ci, num_warps=8, num_stages=2)
    return WgradConfig(walk, box, steps, block_co, block_ci, num_warps=8 if block_co == 128 else 4, num_stages=3)


def _walks(n, h, w, pixels):
    """The ways to cut dz into tiles that a box with leading ones can read: (walk, box, tiles)."""
    if w == power_of_two_dividing(w) and w <= pixels:
        box_h = min(pixels // w, power_of_two_dividing(h))
        box_n = pixels // (w * box_h)
        # more images than one only where whole images are consecutive rows
        if box_n == 1 or box_h == h:
            yield "rows", (box_n, box_h, w), cdiv(n, box_n) * (h // box_h)
    block = max(16, min(pixels, power_of_two_at_least(n)))
    yield "images", (block, 1, 1), cdiv(n, block) * h * w
    block = max(16, min(pixels, power_of_two_at_least(w)))
    yield "row", (1, 1, block), n * h * cdiv(w, block)


ROWS_TILE = 4096  # elements
REDUCTION_PROGRAMS = 528


def rows_config(m: int, c: int) -> RowsConfig:
    """For a pass over [m, c]."""
    divisor = power_of_two_dividing(c)
    block_c = min(MAX_CHANNEL_BLOCK, divisor if divisor >= 16 else power_of_two_at_least(c))
    block_m = max(1, min(ROWS_TILE // block_c, power_of_two_at_least(m)))
    splits = max(1, REDUCTION_PROGRAMS // cdiv(c, block_c))
    steps = cdiv(cdiv(m, block_m), splits)
    return RowsConfig(block_m, block_c, steps, num_warps=4)
