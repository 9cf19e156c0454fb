"""The fused units of a network, found by running it on meta tensors, and the kernels that training them launches."""

from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

from bench.modules import prepared
from rir_kernels import functional, fused
from rir_kernels.dispatch import unsupported
from rir_kernels.layout import empty_channels_last
from rir_kernels.spec import ConvBNActSpec
from rir_kernels.triton.inspect import compiling

CPU, META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True)
class Unit:
    """What a unit's kernels depend on.

    needs_x, needs_residual: whether they get gradients, which images do not. after: None, or where another unit's norm
    made x, whether a ReLU followed it.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...] | None
    bias: bool
    residuals: tuple[tuple[int, ...], ...]
    spec: ConvBNActSpec
    needs_x: bool = True
    needs_residual: bool = False
    after: bool | None = None

    def __str__(self) -> str:
        n, c, h, w = self.x
        kernel = "norm" if self.weight is None else "x".join(map(str, (*self.weight[2:], self.weight[0])))
        stride = "" if self.spec.stride == (1, 1) else f" /{self.spec.stride[0]}"
        return f"{c}@{h}x{w} {kernel}{stride}{' + residual' * len(self.residuals)} x{n}"


NORM = Unit((2, 16, 8, 8), None, False, (), ConvBNActSpec())


def of_network(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Unit]:
    """The distinct fused units of `module`, which is fused or made of our layers, for images of that shape."""
    module = prepared(module, dtype, META).train()
    found, made_by = [], {}

    def apply(x, weight, *_, bias=None, residuals=(), spec, **__):
        y = empty_channels_last(spec.output_shape(x, weight), x)
        unit = Unit(
            tuple(x.shape), None if weight is None else tuple(weight.shape), bias is not None,
            tuple(tuple(residual.shape) for residual in residuals), spec, x is not images,
            any(residual is not images for residual in residuals),
            made_by.get(id(x), (None, None))[0],
        )  # fmt: skip
        found.append(unit)
        if not (spec.post_norm and residuals):  # the norm's input does not tell the mask of a sum
            made_by[id(y)] = spec.relu, y
        return y

    images = torch.empty(shape, dtype=dtype, device=META).contiguous(memory_format=torch.channels_last)
    with mock.patch.object(functional, "apply", apply), torch.no_grad():
        module(images)
    return list(dict.fromkeys(found))


def compile_unit(unit: Unit, dtype: torch.dtype, arch: str) -> int:
    """Compiles the kernels of a training step of the unit for that GPU; how many there are."""
    impl = "triton" if unit.weight is None or not unsupported(_meta(unit.weight, dtype), unit.spec) else "hybrid"
    with compiling(arch) as compiled:
        from rir_kernels.triton.launch.batchnorm import Upstream

        x, spec = _meta(unit.x, dtype), unit.spec
        weight = None if unit.weight is None else _meta(unit.weight, dtype)
        c_out = unit.x[1] if weight is None else unit.weight[0]
        vector = torch.empty(c_out, device=META)
        # the running statistics are updated by a kernel of ours only where all kernels are ours
        running = (vector, vector) if impl == "triton" else (None, None)
        counted = {"momentum": 0.1, "batches": torch.empty((), dtype=torch.int64, device=META)}
        y, z, mean, _, invstd = fused.forward(
            x, weight, torch.empty(c_out, dtype=dtype, device=META) if unit.bias else None, vector, vector, *running,
            [_meta(residual, dtype) for residual in unit.residuals], spec,
            training=True, save=True, impl=impl, **(counted if impl == "triton" else {}),
        )  # fmt: skip
        mask = y if spec.relu and spec.post_norm and unit.residuals else None
        z = x if z is None else z
        upstreams = [None]
        if unit.after is not None and weight is not None and impl == "triton":
            c_in = unit.x[1]
            upstreams.append(Upstream(x, *[torch.empty(c_in, device=META) for _ in range(4)], relu=unit.after))
        for upstream in upstreams:
            fused.backward(
                torch.empty_like(y), x, weight, z, mask, mean, invstd, vector, vector, spec, training=True, impl=impl,
                needs=(unit.needs_x, weight is not None, unit.bias, True, True, unit.needs_residual),
                upstream=upstream,
            )  # fmt: skip
    return len({kernel.hash for *_, kernel in compiled})


def _meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device=META).contiguous(memory_format=torch.channels_last)
