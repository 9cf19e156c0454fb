"""Launches the weight-gradient kernel and the fixed-order sum over its splits."""

import torch

from rir_kernels.triton.config import wgrad_config
from rir_kernels.triton.cost import cdiv
from rir_kernels.triton.launch.partials import sum_partials
from rir_kernels.triton.launch.runtime import (
    describable,
    describe,
    describe_pixels,
    device_guard,
    dot_precision,
    launch,
    uses_tensor_cores,
)
from rir_kernels.triton.wgrad import _conv_bwd_weight_kernel


def conv_weight_grad(dz, x, *, kernel, spec) -> torch.Tensor:
    """dW (C_out, C_in, kh, kw) in channels_last, in x's dtype; dz (N, C_out, H', W'), x (N, C_in, H, W)."""
    dz, x = describable(dz), describable(x)
    n, c_out, h, w = dz.shape
    c_in = x.shape[1]
    taps = kernel[0] * kernel[1]
    stride = spec.stride
    row_planes = [p for p in range(stride[0]) if (p + spec.padding[0]) % stride[0] < kernel[0]]
    # rows of taps in the largest of the launches; every launch splits alike, into one buffer
    tap_rows = cdiv(kernel[0], stride[0])
    config = wgrad_config(n, h, w, c_out, c_in, tap_rows, x.element_size(), uses_tensor_cores(x))
    tiles_n, tiles_h, tiles_w = cdiv(n, config.box[0]), cdiv(h, config.box[1]), cdiv(w, config.box[2])
    splits = cdiv(tiles_n * tiles_h * tiles_w, config.steps)
    partial = torch.empty((splits, c_out, taps, c_in), dtype=torch.float32, device=x.device)
    for plane_h in row_planes:
        first = (plane_h + spec.padding[0]) % stride[0]
        planes = [x[:, :, plane_h :: stride[0], plane_w :: stride[1]] for plane_w in range(stride[1])]
        if planes[0].shape[2] == 0:
            # an image of one row has no odd rows: those taps meet padding alone
            partial.view(splits, c_out, *kernel, c_in)[:, :, first :: stride[0]] = 0
            continue
        programs = splits * cdiv(kernel[0] - first, stride[0])
        programs *= cdiv(c_out, config.block_co) * cdiv(c_in, config.block_ci)
        with device_guard(x):
            launch(
                _conv_bwd_weight_kernel,
                programs,
                _describe_dz(dz, config),
                *[_describe_x(plane, config) for plane in planes],
                *[None] * (2 - len(planes)),
                partial,
                h,
                w,
                tiles_n,
                tiles_h,
                tiles_w,
                C_OUT=c_out,
                C_IN=c_in,
                KERNEL=kernel,
                STRIDE=stride,
                PAD=spec.padding,
                PLANE_H=plane_h,
                WALK=config.walk,
                BOX=config.box,
                STEPS=config.steps,
                BLOCK_CO=config.block_co,
                BLOCK_CI=config.block_ci,
                PRECISION=dot_precision(x),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    dw = torch.empty((c_out, c_in, *kernel), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sum_partials(partial, dw, scale=spec.conv_scale)
    return dw


def _describe_dz(dz, config):
    pixels = config.box[0] * config.box[1] * config.box[2]
    box = [1, 1, pixels, config.block_co]
    if config.walk == "rows":
        n, c, h, w = dz.shape
        pitch = _pixel_pitch(dz)
        return describe(dz.as_strided((1, 1, n * h * w, c), (n * h * w * pitch, n * h * w * pitch, pitch, 1)), box)
    return describe(dz.permute(2, 3, 0, 1) if config.walk == "images" else dz.permute(0, 2, 3, 1), box)


def _describe_x(plane, config):
    if plane.numel() == 0:
        return None
    if config.walk == "images":
        return describe(plane.permute(2, 3, 0, 1), [1, 1, config.box[0], config.block_ci])
    return describe_pixels(plane, config.box, config.block_ci)


def _pixel_pitch(dz) -> int:
    """Distance of consecutive pixels; dz is dense up to channel padding, as `describable` and our kernels leave it."""
    n, c, h, w = dz.shape
    for size, stride, pixels in ((w, dz.stride(3), 1), (h, dz.stride(2), w), (n, dz.stride(0), h * w)):
        if size > 1:
            return stride // pixels
    return c
