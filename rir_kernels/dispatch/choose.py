"""Chooses the implementation: an explicit name never falls back, "auto" may, with a one-time warning.

    "reference"  naive PyTorch          "hybrid"  the vendor's convolution, our norm kernels
    "torch"      ATen ops, packed       "triton"  our kernels throughout

On a CPU "auto" is "torch". Without a convolution (weight None) "hybrid" is "triton", and so is "auto" on a GPU.
"""

import functools

import torch

from ..common import switches, versions
from ..common.arguments import OUR_KERNELS
from ..common.devices import gpu_name, on_gpu
from ..common.spec import ConvBNActSpec
from ..common.tracing import is_transformed, not_traced
from ..common.warn import warn_once
from .choices import measured_choice
from .preference import effective_impl

CAPABILITY_NEEDED = (8, 0)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def resolve(
    impl: str, x: torch.Tensor, weight: torch.Tensor | None, spec: ConvBNActSpec, training: bool = False
) -> str:
    """The implementation for these tensors: a name of IMPLS other than "auto"."""
    impl = effective_impl(impl)
    if impl == "auto":
        return _choose(x, weight, spec, training)[0]
    if impl in OUR_KERNELS:
        _require_kernels(impl, x)
        if is_transformed():
            raise NotImplementedError(
                f'impl="{impl}" has no rules for the transforms of torch.func, nor for forward-mode AD: use "torch", '
                '"reference" or "auto"'
            )
    if impl == "triton" and (missing := unsupported(weight, spec)):
        raise NotImplementedError(f'impl="triton" has no kernel for {missing}: use "hybrid", "torch" or "auto"')
    return "triton" if impl == "hybrid" and weight is None else impl


def unsupported(weight: torch.Tensor | None, spec: ConvBNActSpec) -> str:
    """Which option of this convolution our kernels do not support, or an empty string."""
    if weight is None:
        return ""
    if spec.groups != 1:
        return f"groups={spec.groups}"
    if spec.dilation != (1, 1):
        return f"dilation={spec.dilation}"
    if not set(weight.shape[2:]) <= {1, 3}:
        return f"kernel size {tuple(weight.shape[2:])} (1 and 3 are supported)"
    if not set(spec.stride) <= {1, 2}:
        return f"stride={spec.stride} (1 and 2 are supported)"
    return ""


def why_not_triton(x, weight, spec, training) -> str:
    """Why "auto" does not choose "triton" for these tensors, or an empty string."""
    meant = effective_impl("auto")
    return _choose(x, weight, spec, training)[1] if meant == "auto" else f'use_impl("{meant}")'


def _choose(x, weight, spec, training):
    """Returns what "auto" chooses, and why that is not "triton"."""
    if x.device.type not in ("cuda", "cpu", "meta"):
        warn_once(f"rir_kernels falls back to plain PyTorch: the kernels need a CUDA device, got x on {x.device}")
    if not on_gpu(x):
        return "torch", "x is not on a CUDA device"
    if x.dtype not in KERNEL_DTYPES:
        return "torch", "the kernels take float16, bfloat16 and float32"
    if is_transformed():
        return "torch", "the kernels have no rules for torch.func and forward-mode AD"
    if missing := _missing_on(x.device.index) if x.device.type == "cuda" else versions.triton_missing():
        warn_once(f"rir_kernels falls back to plain PyTorch: {missing}")
        return "torch", missing
    if weight is None:
        return "triton", ""
    # fp32 without TF32 cannot use the tensor cores, which our convolution is built for
    if x.dtype == torch.float32 and not switches.tf32_allowed():
        return "hybrid", "fp32 without TF32 does not use the tensor cores"
    if missing := unsupported(weight, spec):
        return "hybrid", f"there is no kernel for {missing}"
    if torch.compiler.is_compiling():  # sizes may be symbolic there: a look-up would specialize them
        return "triton", ""
    c_out, c_in, kernel, _ = weight.shape
    key = (c_in, c_out, kernel, spec.stride[0], x.shape[2], str(x.dtype), training)
    measured = measured_choice(gpu_name(x), key)
    return (measured, "measured to be faster here") if measured else ("triton", "")


def _require_kernels(impl, x):
    missing = versions.triton_missing()
    if missing:
        raise ImportError(f'impl="{impl}" needs {missing}')
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f'impl="{impl}" takes float16, bfloat16 and float32, got {x.dtype}: use "torch" or "reference"')
    if x.device.type == "cuda":
        if missing := _missing_on(x.device.index):
            raise RuntimeError(f'impl="{impl}": {missing}')
    elif on_gpu(x):
        return
    elif x.device.type == "cpu" and switches.interpreting():
        if x.dtype == torch.bfloat16:
            raise TypeError(
                f'impl="{impl}" refuses bfloat16 under TRITON_INTERPRET=1: the interpreter multiplies the raw bits '
                "and returns wrong numbers; use float32 or float16 there, or a GPU"
            )
    else:
        raise RuntimeError(
            f'impl="{impl}" needs a CUDA device, got x on {x.device}: move the tensors there, set TRITON_INTERPRET=1 '
            'before Python starts to run the kernels on a CPU (slowly), or use impl="auto"'
        )


@not_traced
def _missing_on(index: int) -> str:
    return _find_missing_on(index)


@functools.cache
def _find_missing_on(index: int) -> str:
    if missing := versions.triton_missing():
        return f"needs {missing}"
    if torch.version.hip:
        return "the kernels are written for NVIDIA GPUs, this is a ROCm build of torch"
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY_NEEDED:
        name = torch.cuda.get_device_name(index)
        needed, has = (".".join(map(str, version)) for version in (CAPABILITY_NEEDED, capability))
        return f"the kernels need compute capability {needed} or later, {name} (cuda:{index}) has {has}"
    return ""
