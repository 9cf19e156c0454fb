"""Launches the convolution kernel as forward pass (training, inference) and as data gradient.

Tensors are (N, C, H, W) in channels_last; `stride` and `padding` are pairs. Callers have validated the arguments.
"""

from dataclasses import dataclass
from math import prod
from typing import cast

import torch

from rir_kernels.common.memory_format import empty_channels_last
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.kernels.conv import Moments, Norm, UpstreamNorm, _conv_fwd_kernel
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

NO_NORM = Norm()


def conv_train(x, weight, *, bias, residuals, spec) -> tuple[torch.Tensor, TileMoments]:
    """Returns z = conv (with its epilogue under "pre_norm") and the per-tile statistics of z."""
    z = empty_channels_last(spec.output_shape(x, weight), x)
    addends = () if spec.post_norm else residuals
    moments = _forward(x, weight, z, addends, spec, bias=bias, statistics=True).run()
    return z, cast(TileMoments, moments)


def conv_infer(x, weight, *, bias, residuals, spec, mean, var, gamma, beta, save_z):
    """Returns (y, z or None) of the whole layer with given statistics, in one kernel; `mean`, `var` (C_out,)."""
    y = empty_channels_last(spec.output_shape(x, weight), x)
    z = torch.empty_like(y) if save_z else None
    _forward(
        x, weight, y, residuals, spec, bias=bias, z_out=z, norm=Norm(mean, var, gamma, beta, float(spec.eps))
    ).run()
    return y, z


def conv_data_grad(
    dz, weight, *, shape, spec, upstream: Upstream | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns dx of the given shape: the transposed convolution of dz, plus dz itself on the shortcut's channels.

    With `upstream`, whose dy is dx, also returns the partial sums of that layer's reduction, for `bn_sum`. They are
    None at stride 2, if z is not aligned, or if the tile leaves no registers for z.
    """
    dx = empty_channels_last(shape, dz)
    if dx.numel() == 0:
        return dx, None
    dz = describable(dz)
    # tensor cores read only 16-bit operands transposed from shared memory, not fp32
    weight_t = dz.element_size() == 2
    gradient = {
        "out": dx,
        "planes": [dz, None, None, None],
        "weight": pack_weight(weight, transposed=not weight_t),
        "weight_t": weight_t,
        "addends": [dz[:, : spec.shortcut_channels]] if spec.shortcut_channels else [],
        "spec": spec,
        "c_out": shape[1],
        "c_in": weight.shape[0],
        "kernel": tuple(weight.shape[2:]),
    }
    if spec.stride != (1, 1):
        StridedGradientLaunch(**gradient).run()
        return dx, None
    if upstream is not None and not is_describable(upstream.z):
        upstream = None
    sums = ConvLaunch(**gradient, gradient=True, upstream=upstream).run()
    return dx, cast(torch.Tensor | None, sums)


def _forward(x, weight, out, residuals, spec, **epilogue) -> "ConvLaunch":
    x = describable(x)
    addends = [describable(residual) for residual in residuals]
    if spec.shortcut_channels:
        addends.append(spec.shortcut(x))
    planes = [x, None, None, None]  # no slicing at stride 1: it costs as much as a launch
    if spec.stride != (1, 1):
        for plane_h in range(spec.stride[0]):
            for plane_w in range(spec.stride[1]):
                planes[2 * plane_h + plane_w] = x[:, :, plane_h :: spec.stride[0], plane_w :: spec.stride[1]]
    c_out, c_in, *kernel = weight.shape
    packed = pack_weight(weight, transposed=False)
    return ConvLaunch(out, planes, packed, False, addends, spec, c_out, c_in, tuple(kernel), **epilogue)


@dataclass(frozen=True)
class _Launch:
    """A convolution from `planes` to `out`, independent of its tile.

    planes: the input, or at stride 2 its parity planes; None for an absent one. weight: packed; read transposed if
    weight_t. c_out, c_in: channels. kernel: its height and width.
    """

    out: torch.Tensor
    planes: list[torch.Tensor | None]
    weight: torch.Tensor
    weight_t: bool
    addends: list[torch.Tensor]
    spec: ConvBNActSpec
    c_out: int
    c_in: int
    kernel: tuple[int, int]

    def _run(self, jit_function, kind, problem):
        """Calls `_at` with the rule's tile, or with a smaller one that fits the GPU."""
        gpu, tensor_cores = gpu_of(self.out), uses_tensor_cores(self.out)
        return with_tile_fallback(
            (jit_function.__name__, kind, problem, tensor_cores, gpu),
            jit_function.__name__,
            conv_config(problem, tensor_cores, gpu),
            self._at,
            needs=lambda tile: tile.num_stages * stage_bytes(tile, problem),
            ranked=None if is_forced() else lambda: tiles_for(problem, tensor_cores, gpu),
        )

    def _at(self, config):
        """Launches the kernel with that tile."""
        raise NotImplementedError

    def _constants(self, config):
        """Returns the constexpr arguments that both kernels share."""
        return {
            "C_OUT": self.c_out, "C_IN": self.c_in, "WEIGHT_T": self.weight_t,
            "CONV": (self.kernel, self.spec.stride, self.spec.padding), "BOX": config.box,
            "BLOCK_C": config.block_c, "C_BLOCKS": config.groups, "BLOCK_K": config.block_k,
            "PRECISION": dot_precision(self.out), "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip

    def _described_weight(self, config):
        block = (config.block_k, config.block_c) if self.weight_t else (config.block_c, config.block_k)
        # the leading one keeps the product's left operand in shared memory
        return describe(self.weight, [1, *block])


@dataclass(frozen=True)
class ConvLaunch(_Launch):
    """Launches the forward pass, or the data gradient at stride 1, with an epilogue; see `kernels.conv`.

    norm: at inference. z_out: output for z, in addition to y. statistics: of z, per tile.
    """

    z_out: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    norm: Norm = NO_NORM
    statistics: bool = False
    gradient: bool = False
    upstream: Upstream | None = None

    def run(self) -> TileMoments | torch.Tensor | None:
        """Returns what the epilogue computes per tile: the statistics of z, or the sums of the layer upstream."""
        n, _, h, w = self.out.shape
        padding = self._padding() if self.spec.stride == (1, 1) else None
        problem = Problem(n, h, w, self.c_out, self.c_in, self.kernel, self.out.element_size(), padding)
        is_inference = self.norm.mean is not None
        kind = self.gradient, self.statistics, is_inference, self.z_out is not None, self.upstream is not None
        return self._run(_conv_fwd_kernel, kind, problem)

    def _at(self, config):
        out, spec = self.out, self.spec
        n, _, h, w = out.shape
        tiles_h, tiles_w = cdiv(h, config.box[1] * config.rows), cdiv(w, config.box[2])
        tiles = cdiv(n, config.box[0]) * tiles_h * tiles_w
        moments = TileMoments.empty(tiles, self.c_out, out.device) if self.statistics else None
        upstream, activation = self._upstream(config, tiles)
        addends = [_described(addend, config.box, config.block_c) for addend in self.addends]
        weight = self.weight.mT if self.weight_t else self.weight  # FOLD_2X2 reads it by its strides
        scale = spec.conv_scale if self.gradient else spec.branch_scale
        with device_guard(out):
            launch(
                _conv_fwd_kernel,
                tiles * cdiv(self.c_out, config.groups * config.block_c),
                *self._described_planes(config),
                weight if config.fold else self._described_weight(config),
                *addends,
                *[None] * (2 - len(addends)),
                self._stored(out, config),
                self._stored(self.z_out, config),
                self.bias,
                self.norm,
                Moments() if moments is None else Moments(moments.mean, moments.m2, moments.count),
                *upstream,
                n,
                h,
                w,
                tiles_h,
                tiles_w,
                float(scale) if addends or scale != 1 else None,
                SIGN=-1 if self.gradient else 1,
                POST_NORM=spec.post_norm and not self.gradient,
                ACT=activation,
                ROWS=config.rows,
                SKIP_PADDING=config.skips,
                FOLD_2X2=weight.stride() if config.fold else None,
                **self._constants(config),
            )
        return moments if self.statistics else upstream[1].sums

    def _described_planes(self, config):
        box, planes = config.box, self.planes
        if config.fold:
            x = cast(torch.Tensor, planes[0])
            box = box[0], box[1] // 2, box[2] // 2
            planes = [x[:, :, plane // 2 :: 2, plane % 2 :: 2] for plane in range(4)]
        # omit planes that no tap meets
        is_met = [prod(_taps_of_plane(self.kernel, self.spec, (i // 2, i % 2))) > 0 or i == 0 for i in range(4)]
        return [
            _described(plane if met else None, box, config.block_k) for plane, met in zip(planes, is_met, strict=True)
        ]

    def _stored(self, tensor, config):
        """Returns the kernel's output argument: a descriptor if the GPU has them and the rows are aligned."""
        by_descriptor = gpu_of(self.out).has_descriptors and has_aligned_rows(self.c_out, self.out.element_size())
        return _described(tensor, config.box, config.block_c) if by_descriptor else tensor

    def _upstream(self, config, tiles):
        """Returns ((z's descriptor, the norm upstream and the buffer of its sums), its activation)."""
        upstream, out = self.upstream, self.out
        if upstream is None or not holds_upstream(config, out.element_size(), gpu_of(out)):
            return (None, UpstreamNorm()), self.spec.activation
        z = _described(upstream.z, config.box, config.block_c)
        sums = torch.empty((tiles, 2, self.c_out), dtype=torch.float32, device=out.device)
        norm = UpstreamNorm(upstream.mean, upstream.invstd, upstream.gamma, upstream.beta, sums)
        return (z, norm), upstream.activation

    def _padding(self) -> tuple[int, int]:
        """Returns the launched convolution's padding: the data gradient's is kernel - 1 - padding."""
        if not self.gradient:
            return self.spec.padding
        h, w = (size - 1 - pad for size, pad in zip(self.kernel, self.spec.padding, strict=True))
        return h, w


@dataclass(frozen=True)
class StridedGradientLaunch(_Launch):
    """Launches the data gradient at stride 2, with one sum for each parity plane of `out`; planes: dz first."""

    def run(self) -> None:
        parities, planes = self._parities()
        n, _, h, w = planes[0, 0].shape
        problem = Problem(n, h, w, self.c_out, self.c_in, self.kernel, self.out.element_size(), planes=len(parities))
        self._run(_conv_bwd_data_kernel, bool(self.addends), problem)

    def _parities(self):
        """Returns the parities of which `out` has pixels, those with the most taps first, and the plane of each."""
        stride_h, stride_w = self.spec.stride
        parities = [(p, q) for p in range(stride_h) for q in range(stride_w)]
        planes = {(p, q): self.out[:, :, p::stride_h, q::stride_w] for p, q in parities}
        # an image of one row has no odd rows; programs with the most taps start first
        parities = [parity for parity in parities if planes[parity].numel()]
        parities.sort(key=lambda parity: -prod(_taps_of_plane(self.kernel, self.spec, parity)))
        return parities, planes

    def _at(self, config):
        parities, planes = self._parities()
        n, _, h, w = planes[0, 0].shape
        tiles_h, tiles_w = cdiv(h, config.box[1]), cdiv(w, config.box[2])
        tiles = cdiv(n, config.box[0]) * tiles_h * tiles_w * cdiv(self.c_out, config.groups * config.block_c)
        outs = [planes[parity] for parity in parities]
        if gpu_of(self.out).has_descriptors and has_aligned_rows(self.c_out, self.out.element_size()):
            outs = [describe_pixels(plane, config.box, config.block_c) for plane in outs]
        with device_guard(self.out):
            launch(
                _conv_bwd_data_kernel,
                tiles * len(parities),
                _described(self.planes[0], config.box, config.block_k),
                self._described_weight(config),
                _described(self.addends[0], config.box, config.block_c) if self.addends else None,
                *outs,
                *[None] * (4 - len(outs)),
                n,
                self.out.shape[2],
                self.out.shape[3],
                tiles_h,
                tiles_w,
                *[planes[0, 0].stride(d) for d in (0, 2, 3)],
                float(self.spec.conv_scale) if self.spec.conv_scale != 1 else None,
                PLANES=tuple(parities),
                **self._constants(config),
            )


def _described(tensor, box, block):
    return None if tensor is None or tensor.numel() == 0 else describe_pixels(tensor, box, block)


def _taps_of_plane(kernel, spec, plane) -> tuple[int, int]:
    """Counts the taps that meet a parity plane along each axis; a 1x1 has none that meet the odd planes."""
    first = [(p + pad) % stride for p, pad, stride in zip(plane, spec.padding, spec.stride, strict=True)]
    h, w = (cdiv(size - f, stride) for size, f, stride in zip(kernel, first, spec.stride, strict=True))
    return h, w
