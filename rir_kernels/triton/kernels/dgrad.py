"""Data gradient at stride 2: computes all parity planes of dx in one launch.

Each plane is a separate convolution of dz with the taps that meet the plane (see `conv` for the formulas): a 3x3 has
planes with four, two, two and one taps, a 1x1 one plane with one tap and three with none. A program computes a tile of
one plane. The planes with the most taps come first: programs start in order, so the last ones are short.
"""

import triton
import triton.language as tl

from rir_kernels.triton.kernels.conv import load_addend, pixels, store_tile
from rir_kernels.triton.kernels.conv_loops import add_plane
from rir_kernels.triton.kernels.pointwise import pdl_wait


@triton.jit(do_not_specialize=["N", "H", "W", "TILES_H", "TILES_W", "stride_n", "stride_h", "stride_w", "scale"])
def _conv_bwd_data_kernel(
    dz_desc,  # [N, H / stride, W / stride, C_IN]
    w_desc,  # as in `conv_loops`
    addend_desc,  # added to plane (0, 0); or None
    out0,  # the planes of dx in the order of PLANES: descriptors or pointers; None if there are fewer
    out1,
    out2,
    out3,
    N,
    H,  # of dx
    W,
    TILES_H,  # of the largest plane, used for all
    TILES_W,
    stride_n,  # of a plane, in elements
    stride_h,
    stride_w,
    scale,  # factor of the sum over the taps; None: 1
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    CONV: tl.constexpr,  # (kernel, stride, padding), each (h, w)
    PLANES: tl.constexpr,  # (row, column) of each plane that has pixels
    WEIGHT_T: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    C_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    KERNEL: tl.constexpr = CONV[0]
    STRIDE: tl.constexpr = CONV[1]
    PAD: tl.constexpr = CONV[2]
    # prologue: which plane, which tile
    P: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    TILES_C: tl.constexpr = (C_OUT + C_BLOCKS * BLOCK_C - 1) // (C_BLOCKS * BLOCK_C)
    programs = tl.num_programs(0) // len(PLANES)
    plane = tl.program_id(0) // programs
    pid = tl.program_id(0) % programs
    first_c = pid % TILES_C * (C_BLOCKS * BLOCK_C)
    tile = pid // TILES_C
    w = tile % TILES_W * BOX[2]
    h = tile // TILES_W % TILES_H * BOX[1]
    n = tile // (TILES_W * TILES_H) * BOX[0]

    outs = (out0, out1, out2, out3)
    out = out0
    plane_h = PLANES[0][0]
    plane_w = PLANES[0][1]
    for index in tl.static_range(1, len(PLANES)):
        if plane == index:
            out = outs[index]
            plane_h = PLANES[index][0]
            plane_w = PLANES[index][1]

    # main loop: C_BLOCKS accumulators [BLOCK_C, P]
    accs = ()
    for _ in tl.static_range(C_BLOCKS):
        accs += (tl.zeros([BLOCK_C, P], dtype=tl.float32),)
    # consecutive ifs, all but one skipped: Triton doesn't reuse shared memory between mutually exclusive loops
    for index in tl.static_range(len(PLANES)):
        if plane == index:
            accs = add_plane(
                accs, dz_desc, w_desc, n, h, w, first_c, C_OUT, C_IN, KERNEL, STRIDE, PAD,
                PLANES[index][0], PLANES[index][1], -1, WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
            )  # fmt: skip

    # epilogue: scale, addend, store
    plane_height = (H - plane_h + STRIDE[0] - 1) // STRIDE[0]
    plane_width = (W - plane_w + STRIDE[1] - 1) // STRIDE[1]
    is_pixel, pixel_offset = pixels(n, h, w, N, plane_height, plane_width, stride_n, stride_h, stride_w, BOX)
    for block in tl.static_range(C_BLOCKS):
        acc = accs[block]  # [BLOCK_C, P]
        c = first_c + block * BLOCK_C
        channel = c + tl.arange(0, BLOCK_C)
        if scale is not None:
            acc *= scale
        if addend_desc is not None:
            if plane_h + plane_w == 0:
                acc += load_addend(addend_desc, n, h, w, c, BOX, BLOCK_C)
        mask = (channel < C_OUT)[:, None] & is_pixel[None, :]
        store_tile(out, acc, n, h, w, c, pixel_offset, channel, mask, C_OUT, BOX, BLOCK_C)
