"""Launches the weight-gradient kernel and the fixed-order sum over its slots."""

import dataclasses

import torch
import torch.nn.functional as F

from rir_kernels.triton.kernels.wgrad import _conv_bwd_weight_kernel, _sum_weight_grad_kernel
from rir_kernels.triton.launch.runtime import (
    describable,
    describe,
    describe_pixels,
    device_guard,
    dot_precision,
    gpu_of,
    has_aligned_rows,
    launch,
    uses_tensor_cores,
)
from rir_kernels.triton.launch.tile_fallback import with_tile_fallback
from rir_kernels.triton.tiling import wgrad_cost
from rir_kernels.triton.tiling.conv_cost import cdiv, power_of_two_at_least
from rir_kernels.triton.tiling.conv_tiles import REDUCTION_PROGRAMS, ROWS_TILE
from rir_kernels.triton.tiling.wgrad_tiles import is_forced, ranked_wgrad_tiles, wgrad_tile


def conv_weight_grad(dz, x, *, kernel, spec) -> torch.Tensor:
    """Returns dW (C_out, C_in, kh, kw) in channels_last and x's dtype; dz (N, C_out, H', W'), x (N, C_in, H, W)."""
    c_out, c_in = dz.shape[1], x.shape[1]
    dw = torch.empty((c_out, c_in, *kernel), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if dz.numel() == 0:
        return dw.zero_()
    problem, gpu = weight_grad_problem(dz, x, kernel, spec), gpu_of(x)
    with_tile_fallback(
        (problem, gpu),
        _conv_bwd_weight_kernel.__name__,
        wgrad_tile(problem, gpu),
        lambda tile: _launch(dz, x, dw, kernel, spec, problem, tile, gpu),
        needs=lambda tile: wgrad_cost.shared_bytes(problem, tile),
        ranked=None if is_forced() else lambda: ranked_wgrad_tiles(problem, gpu),
    )
    return dw


def _launch(dz, x, dw, kernel, spec, problem, tile, gpu):
    c_out, c_in = dz.shape[1], x.shape[1]
    cut = wgrad_cost.split(problem, tile, gpu)
    cut = dataclasses.replace(cut, share=int(cut.share))  # the search returns NumPy numbers
    columns = wgrad_cost.packed_columns(problem, tile.pack)
    packed = {"C_OUT": c_out * tile.pack, "C_IN": c_in * tile.pack}
    partial = torch.empty(
        (cut.slots, packed["C_OUT"], kernel[0] * columns, packed["C_IN"]), dtype=torch.float32, device=x.device
    )
    with device_guard(x):
        launch(
            _conv_bwd_weight_kernel,
            cut.programs,
            _describe_dz(_packed(dz, tile.pack), tile),
            *_describe_planes(_packed(x, tile.pack), spec.stride, tile),
            partial,
            cdiv(problem.h, tile.box[1] * tile.rows),
            cdiv(problem.w // tile.pack, tile.box[2]),
            cut.tiles,
            cut.edge_tiles,
            cut.share,
            **packed,
            KERNEL=(kernel[0], columns),
            STRIDE=spec.stride,
            PAD=(spec.padding[0], wgrad_cost.packed_padding(problem, tile.pack)),
            PIXEL_ORDER=tile.walk,
            BOX=tile.box,
            ROWS=tile.rows,
            SKIP_PADDING=tile.skips,
            BLOCK_CO=tile.block_co,
            BLOCK_CI=tile.block_ci,
            PRECISION=dot_precision(x),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        block = max(64, min(512, power_of_two_at_least(dw.numel() // REDUCTION_PROGRAMS)))  # programs for every SM
        launch(
            _sum_weight_grad_kernel,
            cdiv(dw.numel(), block),
            partial,
            dw,
            cut.tiles,
            cut.edge_tiles,
            cut.share,
            cut.slots,
            tile.block_co,
            tile.block_ci,
            float(spec.conv_scale),
            C_OUT=c_out,
            C_IN=c_in,
            KERNEL=kernel,
            PAD_W=problem.padding_w,
            PACK=tile.pack,
            PACKED_W=columns,
            BLOCK_S=ROWS_TILE // block,
            BLOCK=block,
        )


def weight_grad_problem(dz, x, kernel, spec) -> wgrad_cost.WgradProblem:
    n, c_out, h, w = dz.shape
    c_in, item = x.shape[1], x.element_size()
    packs = spec.stride[1] == 1 and x.shape[3] == w
    return wgrad_cost.WgradProblem(
        n, h, w, c_out, c_in, tuple(kernel), spec.padding[1], item, uses_tensor_cores(x),
        shares_rows=spec.stride[0] == 1 and kernel[0] > 1 and h > 1,
        has_border=packs and kernel[1] == 3 and spec.padding[1] == 1,
        packs=packs and has_aligned_rows(c_out, item) and has_aligned_rows(c_in, item),
    )  # fmt: skip


def _packed(x, pack):
    """Returns x (N, C, H, W) as (N, pack * C, H, W / pack); a `describable` view if x is dense."""
    if pack == 1:
        return describable(x)
    n, c, h, w = x.shape
    pixels = describable(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
    return pixels.as_strided((n, h, w // pack, pack * c), (h * w * c, w * c, pack * c, 1)).permute(0, 3, 1, 2)


def _describe_planes(x, stride, tile):
    """Returns descriptors of the four parity planes, indexed row, column; None if the stride has no such plane."""
    missing = [max(0, step - size) for step, size in zip(stride, x.shape[2:], strict=True)]
    if any(missing):
        # an image of one row has no odd rows: append a row of zeros for the taps that read it
        x = describable(F.pad(x, (0, missing[1], 0, missing[0])))
    return [
        _describe_x(x[:, :, row :: stride[0], column :: stride[1]], tile)
        if row < stride[0] and column < stride[1] else None
        for row in range(2) for column in range(2)
    ]  # fmt: skip


def _describe_dz(dz, tile):
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    box = [1, 1, pixels, tile.block_co]
    if tile.walk == "rows":
        n, c, h, w = dz.shape
        pitch = _pixel_pitch(dz)
        return describe(dz.as_strided((1, 1, n * h * w, c), (n * h * w * pitch, n * h * w * pitch, pitch, 1)), box)
    return describe(dz.permute(2, 3, 0, 1) if tile.walk == "images" else dz.permute(0, 2, 3, 1), box)


def _describe_x(plane, tile):
    if tile.walk == "images":
        return describe(plane.permute(2, 3, 0, 1), [1, 1, tile.box[0], tile.block_ci])
    return describe_pixels(plane, tile.box, tile.block_ci)


def _pixel_pitch(dz) -> int:
    """Returns the pixel stride; dz is dense up to channel padding, as `describable` and our kernels leave it."""
    n, c, h, w = dz.shape
    for size, stride, pixels in ((w, dz.stride(3), 1), (h, dz.stride(2), w), (n, dz.stride(0), h * w)):
        if size > 1:
            return stride // pixels
    return c
