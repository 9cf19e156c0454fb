"""A tile of the convolution."""

from typing import NamedTuple

# the kernels' arguments that hold a tile's field under another name
FIELDS = {"C_BLOCKS": "groups", "SKIP_PADDING": "skips", "FOLD_2X2": "fold", "PIXEL_ORDER": "walk"}


class ConvConfig(NamedTuple):
    """Tile of the forward and data-gradient kernel: `box` = (images, rows, columns) of output pixels.

    A program computes `groups` times `block_c` output channels from one load of its pixels, and `rows` vertically
    adjacent boxes, then of one row each, from one load of each input row. With `skips` it omits the taps that would
    read padding; a box is then one pixel of many images. With `fold`, blocks of 2x2 pixels share the rows of the
    product, 4 * `block_c` of them.
    """

    box: tuple[int, int, int]
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int
    groups: int = 1
    rows: int = 1
    skips: bool = False
    fold: bool = False
