"""Launches the convolution kernel as forward pass (training, inference) and as data gradient.

Tensors are (N, C, H, W) in channels_last; `stride` and `padding` are pairs. Arguments are taken as validated.
"""

import torch

from rir_kernels.layout import empty_channels_last
from rir_kernels.triton.config import conv_config
from rir_kernels.triton.conv import _conv_fwd_kernel
from rir_kernels.triton.cost import Problem, cdiv
from rir_kernels.triton.launch.batchnorm import TileMoments
from rir_kernels.triton.launch.packing import pack_weight
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


def conv_train(x, weight, *, bias, residuals, spec) -> tuple[torch.Tensor, TileMoments]:
    """z = conv (with its epilogue under "pre_norm") and the per-tile statistics of z."""
    z = empty_channels_last(spec.output_shape(x, weight), x)
    addends = () if spec.post_norm else residuals
    moments = _launch(x, weight, z, bias=bias, residuals=addends, spec=spec, statistics=True)
    return z, moments


def conv_infer(x, weight, *, bias, residuals, spec, mean, var, gamma, beta, save_z):
    """(y, z or None) of the whole layer with given statistics, in one kernel; `mean`, `var` (C_out,)."""
    y = empty_channels_last(spec.output_shape(x, weight), x)
    z = torch.empty_like(y) if save_z else None
    _launch(x, weight, y, z_out=z, bias=bias, residuals=residuals, spec=spec, norm=(mean, var, gamma, beta))
    return y, z


def conv_data_grad(dz, weight, *, shape, spec) -> torch.Tensor:
    """dx of the given shape: the transposed convolution of dz, plus dz itself on the shortcut's channels."""
    dx = empty_channels_last(shape, dz)
    dz = describable(dz)
    # 16-bit operands can be read transposed from shared memory; fp32 ones cannot
    weight_t = dz.element_size() == 2
    packed = pack_weight(weight, transposed=not weight_t)
    for plane_h in range(spec.stride[0]):
        for plane_w in range(spec.stride[1]):
            plane = dx if spec.stride == (1, 1) else dx[:, :, plane_h :: spec.stride[0], plane_w :: spec.stride[1]]
            if plane.numel() == 0:
                continue
            shortcut = spec.shortcut_channels if plane_h == plane_w == 0 else 0
            addends = [dz[:, :shortcut]] if shortcut else []
            if not addends and not _meets(tuple(weight.shape[2:]), spec, plane_h, plane_w):
                plane.zero_()  # a 1x1 at stride 2 never reads these pixels
                continue
            _launch_tiles(
                [dz, None, None, None],
                packed,
                plane,
                c=shape[1],
                k=weight.shape[0],
                kernel=tuple(weight.shape[2:]),
                addends=addends,
                spec=spec,
                out_plane=(plane_h, plane_w),
                weight_t=weight_t,
            )
    return dx


def _launch(x, weight, out, *, residuals, spec, **epilogue):
    x = describable(x)
    addends = [describable(residual) for residual in residuals]
    if spec.shortcut_channels:
        addends.append(spec.shortcut(x))
    planes = [x, None, None, None]  # at stride 1: slicing costs as much as a launch
    if spec.stride != (1, 1):
        for plane_h in range(spec.stride[0]):
            for plane_w in range(spec.stride[1]):
                planes[2 * plane_h + plane_w] = x[:, :, plane_h :: spec.stride[0], plane_w :: spec.stride[1]]
    return _launch_tiles(
        planes,
        pack_weight(weight, transposed=False),
        out,
        c=weight.shape[0],
        k=weight.shape[1],
        kernel=tuple(weight.shape[2:]),
        addends=addends,
        spec=spec,
        **epilogue,
    )


def _launch_tiles(
    planes,
    packed_weight,
    out,
    *,
    c,
    k,
    kernel,
    addends,
    spec,
    z_out=None,
    bias=None,
    norm=(None, None, None, None),
    statistics=False,
    out_plane=None,
    weight_t=False,
) -> TileMoments | None:
    n, _, h, w = out.shape
    stride_1 = spec.stride == (1, 1)
    taps = kernel if out_plane is None else _taps_of_plane(kernel, spec, out_plane)
    problem = Problem(n, h, w, c, k, taps, out.element_size(), _padding(kernel, spec, out_plane) if stride_1 else None)
    config = conv_config(problem, uses_tensor_cores(out), gpu_of(out))
    tiles_h, tiles_w = cdiv(h, config.box[1] * config.rows), cdiv(w, config.box[2])
    tiles = cdiv(n, config.box[0]) * tiles_h * tiles_w
    moments = TileMoments.empty(tiles, c, out.device) if statistics else None

    def described(tensor, block, box=config.box):
        return None if tensor is None or tensor.numel() == 0 else describe_pixels(tensor, box, block)

    def stored(tensor):
        aligned = tensor is not None and has_aligned_rows(c, tensor.element_size())
        return described(tensor, config.block_c) if aligned else tensor

    in_box = config.box
    if config.fold:
        in_box = config.box[0], config.box[1] // 2, config.box[2] // 2
        planes = [planes[0][:, :, plane // 2 :: 2, plane % 2 :: 2] for plane in range(4)]
    # a plane that no tap meets need not be read
    met = [
        plane if _meets(kernel, spec, index // 2, index % 2) or index == 0 else None
        for index, plane in enumerate(planes)
    ]
    # the leading one keeps the left operand of the product in shared memory
    weight_box = [1, config.block_k, config.block_c] if weight_t else [1, config.block_c, config.block_k]
    weight = packed_weight.mT if weight_t else packed_weight
    scale = spec.branch_scale if out_plane is None else spec.conv_scale
    addends = [described(addend, config.block_c) for addend in addends]
    with device_guard(out):
        launch(
            _conv_fwd_kernel,
            tiles * cdiv(c, config.groups * config.block_c),
            *[described(plane, config.block_k, in_box) for plane in met],
            weight if config.fold else describe(packed_weight, weight_box),
            *addends,
            *[None] * (2 - len(addends)),
            stored(out),
            stored(z_out),
            bias,
            *norm,
            moments.mean if statistics else None,
            moments.m2 if statistics else None,
            moments.count if statistics else None,
            n,
            h,
            w,
            tiles_h,
            tiles_w,
            *[out.stride(d) for d in (0, 2, 3)],
            float(scale) if addends or scale != 1 else None,
            float(spec.eps),
            C=c,
            K=k,
            KERNEL=kernel,
            STRIDE=spec.stride,
            PAD=spec.padding,
            OUT_PLANE=out_plane,
            WEIGHT_T=weight_t,
            POST_NORM=spec.post_norm and out_plane is None,
            RELU=spec.relu,
            BOX=config.box,
            BLOCK_C=config.block_c,
            GROUPS=config.groups,
            ROWS=config.rows,
            SKIPS=config.skips,
            FOLD=config.fold,
            WEIGHT_STRIDES=weight.stride() if config.fold else None,
            BLOCK_K=config.block_k,
            PRECISION=dot_precision(out),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return moments


def _taps_of_plane(kernel, spec, plane) -> tuple[int, int]:
    """How many taps a parity plane of the data gradient meets along each axis, at least one."""
    first = [(p + pad) % stride for p, pad, stride in zip(plane, spec.padding, spec.stride, strict=True)]
    return tuple(max(1, cdiv(size - f, s)) for size, f, s in zip(kernel, first, spec.stride, strict=True))


def _padding(kernel, spec, out_plane) -> tuple[int, int]:
    """Of the convolution that is launched: the data gradient is one with the padding that is left."""
    if out_plane is None:
        return spec.padding
    return tuple(size - 1 - pad for size, pad in zip(kernel, spec.padding, strict=True))


def _meets(kernel, spec, plane_h, plane_w) -> bool:
    """Whether any tap reads that parity plane of the input (a 1x1 at stride 2 reads one of four)."""
    first_h = (plane_h + spec.padding[0]) % spec.stride[0]
    first_w = (plane_w + spec.padding[1]) % spec.stride[1]
    return first_h < kernel[0] and first_w < kernel[1]
