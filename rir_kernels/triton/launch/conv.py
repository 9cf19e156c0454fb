"""Launches the convolution kernel as forward pass (training, inference) and as data gradient.

Tensors are (N, C, H, W) in channels_last; `stride` and `padding` are pairs. Arguments are taken as validated.
"""

from math import prod
from typing import cast

import torch

from rir_kernels.common.memory_format import empty_channels_last
from rir_kernels.triton.kernels.conv import _conv_fwd_kernel
from rir_kernels.triton.kernels.dgrad import _conv_bwd_data_kernel
from rir_kernels.triton.launch.batchnorm import TileMoments, Upstream
from rir_kernels.triton.launch.packing import pack_weight
from rir_kernels.triton.launch.runtime import (
    describable,
    describe,
    describe_pixels,
    device_guard,
    dot_precision,
    gpu_of,
    has_aligned_rows,
    is_describable,
    launch,
    uses_tensor_cores,
)
from rir_kernels.triton.launch.tile_fallback import with_tile_fallback
from rir_kernels.triton.tiling.conv_cost import Problem, cdiv, stage_bytes
from rir_kernels.triton.tiling.conv_tiles import conv_config, holds_upstream, is_forced, tiles_for


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


def conv_data_grad(
    dz, weight, *, shape, spec, upstream: Upstream | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx of the given shape: the transposed convolution of dz, plus dz itself on the shortcut's channels.

    With the layer upstream, whose dy it is, also the partial sums of that layer's reduction, for `bn_sum`; None where
    they are not computed: at strides of two, where z is not aligned, and where the tile leaves no registers for it.
    """
    dx = empty_channels_last(shape, dz)
    if dx.numel() == 0:
        return dx, None
    dz = describable(dz)
    # 16-bit operands can be read transposed from shared memory; fp32 ones cannot
    weight_t = dz.element_size() == 2
    gradient = {
        "c": shape[1],
        "k": weight.shape[0],
        "kernel": tuple(weight.shape[2:]),
        "addends": [dz[:, : spec.shortcut_channels]] if spec.shortcut_channels else [],
        "spec": spec,
        "weight_t": weight_t,
    }
    packed = pack_weight(weight, transposed=not weight_t)
    if spec.stride != (1, 1):
        _launch_planes(dz, packed, dx, **gradient)
        return dx, None
    if upstream is not None and not is_describable(upstream.z):
        upstream = None
    sums = _launch_tiles([dz, None, None, None], packed, dx, gradient=True, upstream=upstream, **gradient)
    return dx, cast(torch.Tensor | None, sums)


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
    gradient=False,
    upstream=None,
    weight_t=False,
) -> TileMoments | torch.Tensor | None:
    """Returns what the epilogue gathers tile by tile: the statistics of z, or the sums of the layer upstream."""
    n, _, h, w = out.shape
    padding = _padding(kernel, spec, gradient) if spec.stride == (1, 1) else None
    problem = Problem(n, h, w, c, k, kernel, out.element_size(), padding)
    kind = gradient, statistics, norm[0] is not None, z_out is not None, upstream is not None

    def attempt(config):
        return _launch_tiles_of(
            config, planes, packed_weight, out, c=c, k=k, kernel=kernel, addends=addends, spec=spec, z_out=z_out,
            bias=bias, norm=norm, statistics=statistics, gradient=gradient, upstream=upstream, weight_t=weight_t,
        )  # fmt: skip

    return _with_room(_conv_fwd_kernel, kind, problem, out, attempt)


def _with_room(kernel, kind, problem, out, attempt):
    """attempt(tile), by the rule's tile or a smaller one."""
    gpu, tensor_cores = gpu_of(out), uses_tensor_cores(out)
    return with_tile_fallback(
        (kernel.__name__, kind, problem, tensor_cores, gpu),
        kernel.__name__,
        conv_config(problem, tensor_cores, gpu),
        attempt,
        needs=lambda tile: tile.num_stages * stage_bytes(tile, problem),
        ranked=None if is_forced() else lambda: tiles_for(problem, tensor_cores, gpu),
    )


def _launch_tiles_of(
    config, planes, packed_weight, out, *, c, k, kernel, addends, spec, z_out, bias, norm, statistics, gradient,
    upstream, weight_t,
):  # fmt: skip
    """With that tile."""
    n, _, h, w = out.shape
    tiles_h, tiles_w = cdiv(h, config.box[1] * config.rows), cdiv(w, config.box[2])
    tiles = cdiv(n, config.box[0]) * tiles_h * tiles_w
    moments = TileMoments.empty(tiles, c, out.device) if statistics else None
    upstream_args, partial, relu = [None] * 5, None, spec.relu
    by_descriptor = gpu_of(out).has_descriptors and has_aligned_rows(c, out.element_size())

    def described(tensor, block, box=config.box):
        return None if tensor is None or tensor.numel() == 0 else describe_pixels(tensor, box, block)

    def stored(tensor):
        return described(tensor, config.block_c) if by_descriptor else tensor

    in_box = config.box
    if config.fold:
        in_box = config.box[0], config.box[1] // 2, config.box[2] // 2
        planes = [planes[0][:, :, plane // 2 :: 2, plane % 2 :: 2] for plane in range(4)]
    # a plane that no tap meets need not be read
    met = [
        plane if prod(_taps_of_plane(kernel, spec, (index // 2, index % 2))) or index == 0 else None
        for index, plane in enumerate(planes)
    ]
    weight = packed_weight.mT if weight_t else packed_weight
    scale = spec.conv_scale if gradient else spec.branch_scale
    addends = [described(addend, config.block_c) for addend in addends]
    if upstream is not None and holds_upstream(config, out.element_size(), gpu_of(out)):
        z = described(upstream.z, config.block_c)
        upstream_args = [z, upstream.mean, upstream.invstd, upstream.gamma, upstream.beta]
        partial = torch.empty((tiles, 2, c), dtype=torch.float32, device=out.device)
        relu = upstream.relu
    with device_guard(out):
        launch(
            _conv_fwd_kernel,
            tiles * cdiv(c, config.groups * config.block_c),
            *[described(plane, config.block_k, in_box) for plane in met],
            weight if config.fold else _described_weight(packed_weight, config, weight_t),
            *addends,
            *[None] * (2 - len(addends)),
            stored(out),
            stored(z_out),
            bias,
            *norm,
            None if moments is None else moments.mean,
            None if moments is None else moments.m2,
            None if moments is None else moments.count,
            *upstream_args,
            partial,
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
            SIGN=-1 if gradient else 1,
            WEIGHT_T=weight_t,
            POST_NORM=spec.post_norm and not gradient,
            RELU=relu,
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
    return moments if statistics else partial


def _launch_planes(dz, packed_weight, dx, *, c, k, kernel, addends, spec, weight_t) -> None:
    """The data gradient at strides of two."""
    parities = [(p, q) for p in range(spec.stride[0]) for q in range(spec.stride[1])]
    planes = {(p, q): dx[:, :, p :: spec.stride[0], q :: spec.stride[1]] for p, q in parities}
    # an image of one row has no odd rows; programs of most taps start first
    parities = [parity for parity in parities if planes[parity].numel()]
    parities.sort(key=lambda parity: -prod(_taps_of_plane(kernel, spec, parity)))
    n, _, h, w = planes[0, 0].shape
    problem = Problem(n, h, w, c, k, kernel, dx.element_size(), planes=len(parities))

    def attempt(config):
        _launch_planes_of(
            config, planes, parities, dz, packed_weight, dx,
            c=c, k=k, kernel=kernel, addends=addends, spec=spec, weight_t=weight_t,
        )  # fmt: skip

    _with_room(_conv_bwd_data_kernel, bool(addends), problem, dx, attempt)


def _launch_planes_of(
    config, planes, parities, dz, packed_weight, dx, *, c, k, kernel, addends, spec, weight_t
) -> None:
    """With that tile."""
    n, _, h, w = planes[0, 0].shape
    tiles_h, tiles_w = cdiv(h, config.box[1]), cdiv(w, config.box[2])
    tiles = cdiv(n, config.box[0]) * tiles_h * tiles_w * cdiv(c, config.groups * config.block_c)
    outs = [planes[parity] for parity in parities]
    if gpu_of(dx).has_descriptors and has_aligned_rows(c, dx.element_size()):
        outs = [describe_pixels(plane, config.box, config.block_c) for plane in outs]
    with device_guard(dx):
        launch(
            _conv_bwd_data_kernel,
            tiles * len(parities),
            describe_pixels(dz, config.box, config.block_k),
            _described_weight(packed_weight, config, weight_t),
            describe_pixels(addends[0], config.box, config.block_c) if addends else None,
            *outs,
            *[None] * (4 - len(outs)),
            n,
            dx.shape[2],
            dx.shape[3],
            tiles_h,
            tiles_w,
            *[planes[0, 0].stride(d) for d in (0, 2, 3)],
            float(spec.conv_scale) if spec.conv_scale != 1 else None,
            C=c,
            K=k,
            KERNEL=kernel,
            STRIDE=spec.stride,
            PAD=spec.padding,
            PLANES=tuple(parities),
            WEIGHT_T=weight_t,
            BOX=config.box,
            BLOCK_C=config.block_c,
            GROUPS=config.groups,
            BLOCK_K=config.block_k,
            PRECISION=dot_precision(dx),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _described_weight(packed_weight, config, weight_t):
    block = (config.block_k, config.block_c) if weight_t else (config.block_c, config.block_k)
    # the leading one keeps the left operand of the product in shared memory
    return describe(packed_weight, [1, *block])


def _taps_of_plane(kernel, spec, plane) -> tuple[int, int]:
    """How many taps meet a parity plane along each axis: none of a 1x1 the odd ones."""
    first = [(p + pad) % stride for p, pad, stride in zip(plane, spec.padding, spec.stride, strict=True)]
    h, w = (cdiv(size - f, stride) for size, f, stride in zip(kernel, first, spec.stride, strict=True))
    return h, w


def _padding(kernel, spec, gradient) -> tuple[int, int]:
    """Of the convolution that is launched: the data gradient is one with the padding that is left."""
    if not gradient:
        return spec.padding
    return tuple(size - 1 - pad for size, pad in zip(kernel, spec.padding, strict=True))
