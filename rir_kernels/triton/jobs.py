"""A kernel to be compiled elsewhere: a launch whose arguments are reduced to what the compiler looks at."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from rir_kernels.triton.launch.runtime import ALIGNMENT
from rir_kernels.triton.plan.places import like

_LARGEST = 2**31 - 1  # Triton's largest i32


@dataclass(frozen=True)
class Job:
    """A launch to compile. Launches that Triton compiles to one kernel have equal jobs."""

    module: str
    kernel: str
    args: tuple
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel, args, options) -> "Job":
        named = zip(kernel.params, args, strict=False)
        args = tuple(arg if param.is_constexpr else _reduced(arg, param.do_not_specialize) for param, arg in named)
        return cls(kernel.fn.__module__, kernel.fn.__name__, args, tuple(sorted(options.items())))

    def compile(self):
        """Returns the compiled kernel, for the GPU that Triton's driver names."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return kernel.warmup(*[_restored(arg) for arg in self.args], grid=(1,), **dict(self.options))


@dataclass(frozen=True)
class _Tensor:
    dtype: torch.dtype
    aligned: bool

    def restored(self):
        start = 0 if self.aligned else 1
        return torch.empty(start + 1, dtype=self.dtype, device="meta")[start:]


@dataclass(frozen=True)
class _Descriptor:
    dtype: torch.dtype
    block: tuple[int, ...]
    padding: str

    def restored(self):
        shape = [size * ALIGNMENT for size in self.block]
        strides = torch.empty(shape, device="meta").stride()
        base = torch.empty(shape, dtype=self.dtype, device="meta")
        return TensorDescriptor(base, shape, [*strides], [*self.block], self.padding)


def _reduced(arg, do_not_specialize):
    if isinstance(arg, torch.Tensor):
        return _Tensor(arg.dtype, arg.data_ptr() % ALIGNMENT == 0)
    if isinstance(arg, TensorDescriptor):
        return _Descriptor(arg.base.dtype, tuple(arg.block_shape), arg.padding)
    if isinstance(arg, tuple):
        return like(arg)([_reduced(part, False) for part in arg])  # Triton specializes integers within tuples
    if type(arg) is int:
        if arg > _LARGEST:
            return _LARGEST + (17 if do_not_specialize or arg % 16 == 0 else 18)
        return 3 if do_not_specialize else arg if arg in (0, 1) else 16 if arg % 16 == 0 else 3
    return 1.0 if isinstance(arg, float) else arg


def _restored(arg):
    if isinstance(arg, (_Tensor, _Descriptor)):
        return arg.restored()
    return like(arg)(map(_restored, arg)) if isinstance(arg, tuple) else arg
