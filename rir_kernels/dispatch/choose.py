"""Which implementation runs: an explicit name never falls back, "auto" does, and says so once.

    "reference"  naive PyTorch          "hybrid"  the vendor's convolution, our norm kernels
    "torch"      ATen ops, packed       "triton"  our kernels throughout

On a CPU "auto" is "torch". Where there is no convolution (weight None) "hybrid" is "triton", and so is "auto" on a GPU.
"""

import contextlib
import functools
import importlib.metadata
import os
import re
import threading
import warnings

import torch
from torch.autograd import forward_ad

from ..common.compiling import not_traced
from ..common.spec import ConvBNActSpec
from .choices import measured_choice
from .preference import meant_by

TRITON_NEEDED, TORCH_NEEDED = (3, 6), (2, 10)
CAPABILITY_NEEDED = (8, 0)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _PerThread(threading.local):
    watched = False  # whether each launch is to be looked at, or chosen
    # (type of device, a GPU's name): tensors there stand for tensors on that GPU
    stand_in: tuple[str, str] | None = None


_state = _PerThread()
_warned: set[str] = set()


@contextlib.contextmanager
def watched():
    """Within it no call of this thread takes the short way (`eager`), so that every launch is made anew."""
    _state.watched, saved = True, _state.watched
    try:
        yield
    finally:
        _state.watched = saved


@contextlib.contextmanager
def standing_for(gpu: str, kind: str = "meta"):
    """Within it tensors on devices of that kind count, in this thread, as tensors on a GPU that runs the kernels.

    gpu: its name, or "".
    """
    _state.stand_in, saved = (kind, gpu), _state.stand_in
    try:
        yield
    finally:
        _state.stand_in = saved


def all_stand_for(gpu: str, kind: str) -> None:
    """The same for all of the process, for good: its CPU emulates a GPU."""
    _state.stand_in = _PerThread.stand_in = kind, gpu


def device_kind(device: torch.device) -> str:
    """The device's type; that of a GPU where meta tensors stand for tensors on one."""
    return "cuda" if device.type == "meta" and _stands_in(device) else device.type


def _stands_in(device):
    return _state.stand_in is not None and _state.stand_in[0] == device.type


def on_gpu(x: torch.Tensor) -> bool:
    """Whether x is on a GPU, or stands for a tensor that is."""
    return x.device.type == "cuda" or _stands_in(x.device)


def plainly_eager() -> bool:
    """Whether nothing watches or transforms operators here: compiler, tracer, dispatch mode, function transform."""
    return (
        not torch.compiler.is_compiling()
        and not _state.watched
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD looks through operators here, which the kernels have no rules for."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def resolve(
    impl: str, x: torch.Tensor, weight: torch.Tensor | None, spec: ConvBNActSpec, training: bool = False
) -> str:
    """The implementation for these tensors: a name of IMPLS other than "auto"."""
    impl = meant_by(impl)
    if impl == "auto":
        return _choose(x, weight, spec, training)[0]
    if impl in ("hybrid", "triton"):
        _require_kernels(impl, x)
        if _transformed():
            raise NotImplementedError(
                f'impl="{impl}" has no rules for the transforms of torch.func, nor for forward-mode AD: use "torch", '
                '"reference" or "auto"'
            )
    if impl == "triton" and (missing := unsupported(weight, spec)):
        raise NotImplementedError(f'impl="triton" has no kernel for {missing}: use "hybrid", "torch" or "auto"')
    return "triton" if impl == "hybrid" and weight is None else impl


def unsupported(weight: torch.Tensor | None, spec: ConvBNActSpec) -> str:
    """What of this convolution our kernels do not do, or an empty string."""
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
    """Why "auto" does not run our kernels throughout for these tensors, or an empty string."""
    meant = meant_by("auto")
    return _choose(x, weight, spec, training)[1] if meant == "auto" else f'use_impl("{meant}")'


def _choose(x, weight, spec, training):
    """What "auto" takes, and why that is not "triton"."""
    if x.device.type not in ("cuda", "cpu", "meta"):
        warn_once(f"rir_kernels falls back to plain PyTorch: the kernels need a CUDA device, got x on {x.device}")
    if not on_gpu(x):
        return "torch", "x is not on a CUDA device"
    if x.dtype not in KERNEL_DTYPES:
        return "torch", "the kernels take float16, bfloat16 and float32"
    if _transformed():
        return "torch", "the kernels have no rules for torch.func and forward-mode AD"
    if missing := _missing_on(x.device.index) if x.device.type == "cuda" else triton_missing():
        warn_once(f"rir_kernels falls back to plain PyTorch: {missing}")
        return "torch", missing
    if weight is None:
        return "triton", ""
    # fp32 without TF32 has no tensor cores: nothing of what our convolution is made for
    if x.dtype == torch.float32 and not tf32_allowed():
        return "hybrid", "fp32 without TF32 does not use the tensor cores"
    if missing := unsupported(weight, spec):
        return "hybrid", f"there is no kernel for {missing}"
    if torch.compiler.is_compiling():  # sizes may be symbols there: to look one up would pin it down
        return "triton", ""
    c_out, c_in, kernel, _ = weight.shape
    key = (c_in, c_out, kernel, spec.stride[0], x.shape[2], str(x.dtype), training)
    name = _device_name(x.device.index) if x.device.type == "cuda" else _state.stand_in[1] if _state.stand_in else ""
    measured = measured_choice(name, key)
    return (measured, "measured to be faster here") if measured else ("triton", "")


def tf32_allowed() -> bool:
    """torch's own switch for fp32 convolutions."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined] # torch's types lack it


def _require_kernels(impl, x):
    missing = triton_missing()
    if missing:
        raise ImportError(f'impl="{impl}" needs {missing}')
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f'impl="{impl}" takes float16, bfloat16 and float32, got {x.dtype}: use "torch" or "reference"')
    if x.device.type == "cuda":
        if missing := _missing_on(x.device.index):
            raise RuntimeError(f'impl="{impl}": {missing}')
    elif on_gpu(x):
        return
    elif x.device.type == "cpu" and interpreting():
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


def overlap_asked() -> bool:
    """Whether launches are to overlap the one ahead of them (programmatic dependent launch)."""
    return os.environ.get("RIR_KERNELS_OVERLAP") == "1"


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@not_traced
def triton_missing() -> str:
    """What stands against importing the kernels ("triton >= 3.6 ..., found ..."), or an empty string."""
    if _numbers(torch.__version__) < TORCH_NEEDED:
        return f"torch >= {'.'.join(map(str, TORCH_NEEDED))}, found {torch.__version__}"
    needed = f"triton >= {'.'.join(map(str, TRITON_NEEDED))}"
    try:
        import triton
    except Exception as error:  # a broken install raises more than ImportError
        return f"{needed}, which cannot be imported here ({type(error).__name__}: {error}): pip install triton"
    version = _version_of(triton)
    return f"{needed}, found {version}" if _numbers(version) < TRITON_NEEDED else ""


@functools.cache
def triton_release() -> tuple[int, ...] | None:
    """(3, 7) of Triton 3.7.1; None where it cannot be imported."""
    try:
        import triton
    except Exception:  # as above
        return None
    return _numbers(_version_of(triton))


def _version_of(triton) -> str:
    return getattr(triton, "__version__", None) or importlib.metadata.version("triton")


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 7) of "3.7rc1+cu130"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@not_traced
def _missing_on(index: int) -> str:
    return _find_missing_on(index)


@functools.cache
def _find_missing_on(index: int) -> str:
    if missing := triton_missing():
        return f"needs {missing}"
    if torch.version.hip:
        return "the kernels are written for NVIDIA GPUs, this is a ROCm build of torch"
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY_NEEDED:
        name = torch.cuda.get_device_name(index)
        needed, has = (".".join(map(str, version)) for version in (CAPABILITY_NEEDED, capability))
        return f"the kernels need compute capability {needed} or later, {name} (cuda:{index}) has {has}"
    return ""


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@not_traced
def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
