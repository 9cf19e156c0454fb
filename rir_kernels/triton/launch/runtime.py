"""Launches kernels, and builds the descriptors of their tensors."""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from contextvars import ContextVar

import torch
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from rir_kernels.common.devices import standing_for
from rir_kernels.common.switches import interpreting, overlap_asked, tf32_allowed
from rir_kernels.common.tracing import no_replay
from rir_kernels.triton.launch import compile_cache
from rir_kernels.triton.tiling.gpus import H200, Gpu, typical_gpu

if interpreting():
    importlib.import_module("rir_kernels.triton.launch.interpreter").patch()
else:
    compile_cache.ensure_writable()

ALIGNMENT = 16  # bytes: of a descriptor's base and of every stride but the last

# (function, device) while launches are intercepted
_intercept: ContextVar[tuple[Callable, torch.device | None] | None] = ContextVar("intercept", default=None)
_foreseen: ContextVar[tuple[Callable, Gpu] | None] = ContextVar("foreseen", default=None)
observers: list[Callable] = []  # process-wide, see `observed`


def launch(kernel, programs: int, *args, **options) -> None:
    """Launches `programs` programs of `kernel` on a one-dimensional grid, whose limit is 2^31 - 1."""
    overlap = overlaps()
    options["USE_PDL"] = overlap
    if overlap:
        options["launch_pdl"] = True
    if "TRITON_DEFAULT_FP_FUSION" not in os.environ:
        # fuse multiply and add: the default until Triton 3.9, which warns that 3.10 changes it
        options["enable_fp_fusion"] = True
    if (intercept := _intercept.get()) is not None:
        intercept[0](kernel, programs, *args, **options)
    elif (note := foreseeing()) is not None:
        note(kernel, args, options)
    else:
        kernel[(programs,)](*args, **options)
        if observers:
            report(kernel, programs, options)


def overlaps() -> bool:
    """Whether a launch may start before the previous one has finished (programmatic dependent launch); opt-in.

    Each kernel waits before it touches memory (`pointwise.pdl_wait`), so results are the same.
    """
    if not overlap_asked() or interpreting():
        return False
    foreseen = _foreseen.get()
    return (driver.active.get_current_target().arch if foreseen is None else foreseen[1].arch) >= 90


@contextlib.contextmanager
def foreseen(note: Callable, gpu: Gpu):
    """Makes meta tensors stand for tensors on that GPU, and calls note(kernel, args, options) instead of each launch.

    Calls take the paths they would take on that GPU, including plans. Affects only this thread.
    """
    token = _foreseen.set((note, gpu))
    try:
        with standing_for(gpu.name):
            yield
    finally:
        _foreseen.reset(token)


def foreseeing() -> Callable | None:
    """Returns the `note` function of the current `foreseen` context, or None."""
    foreseen = _foreseen.get()
    return None if foreseen is None else foreseen[0]


@contextlib.contextmanager
def intercepted(function: Callable, device: torch.device | None = None):
    """Makes `launch` call function(kernel, programs, *args, **options) instead of running the kernel.

    Meta tensors then stand for tensors on `device`. Affects only this thread.
    """
    token = _intercept.set((function, device))
    try:
        with no_replay():
            yield
    finally:
        _intercept.reset(token)


@contextlib.contextmanager
def observed(function: Callable):
    """Calls function(kernel, programs, options) after each launch, in the thread that made it.

    Calls run as usual, including plan replay. Launches of every thread are reported: backward launches in autograd's
    threads. A CUDA graph launches when it is captured, not when it is replayed.
    """
    observers.append(function)
    try:
        yield
    finally:
        observers.remove(function)


def report(kernel, programs: int, options: dict) -> None:
    """Reports a launch to the observers."""
    for function in observers.copy():
        function(kernel, programs, options)


def device_guard(tensor: torch.Tensor):
    """Makes the tensor's device the current one: Triton launches on the current device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> torch.device:
    """Returns the device of the tensor, or of the tensor that a meta tensor stands for."""
    if tensor.is_meta and (intercept := _intercept.get()) is not None:
        return intercept[1] or tensor.device
    return tensor.device


def gpu_of(tensor: torch.Tensor) -> Gpu:
    """Returns the GPU that tiles are chosen for; the default if no GPU will run them."""
    device = device_of(tensor)
    if device.type == "cuda":
        return gpu_at(device)
    if (foreseen := _foreseen.get()) is not None:
        return foreseen[1]
    return H200 if interpreting() else typical_gpu(driver.active.get_current_target().arch)


@functools.cache
def gpu_at(device: torch.device) -> Gpu:
    """Returns the properties of a GPU of this machine."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined] # torch's types lack it
        properties.name,
        10 * properties.major + properties.minor,
    )


def has_aligned_rows(channels: int, itemsize: int) -> bool:
    """Whether dense channels-last rows of that many channels are aligned for a descriptor."""
    return channels * itemsize % ALIGNMENT == 0


def describable(x: torch.Tensor) -> torch.Tensor:
    """Returns x (N, C, H, W) if a descriptor can read it in place, else a copy with aligned channels-last rows.

    In place requires channels innermost, and base and pixel strides that are multiples of 16 bytes; a slice of channels
    of a larger tensor qualifies. Strides of dimensions of size one are ignored.
    """
    if is_describable(x):
        return x
    n, c, h, w = x.shape
    pitch = aligned_channels(c, x.element_size())
    copy = torch.empty_strided((n, c, h, w), (h * w * pitch, 1, w * pitch, pitch), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def is_describable(x: torch.Tensor) -> bool:
    """Whether a descriptor can read x (N, C, H, W) in place."""
    item = x.element_size()
    innermost = x.shape[1] == 1 or x.stride(1) == 1
    pixel_strides = [x.stride(dim) for dim in (0, 2, 3) if x.shape[dim] > 1]
    aligned = all(stride > 0 and stride * item % ALIGNMENT == 0 for stride in pixel_strides)
    return innermost and aligned and x.data_ptr() % ALIGNMENT == 0


def describe(view: torch.Tensor, box: list[int]) -> TensorDescriptor | tuple:
    """Returns a descriptor of a view whose last dimension is contiguous and whose other strides are aligned.

    Strides of dimensions of size one are arbitrary in torch; any multiple of 16 bytes replaces them here. On GPUs
    without descriptors, returns the tuple that `kernels.tma` takes instead.
    """
    fallback = aligned_channels(view.shape[-1], view.element_size())
    strides = [s if size > 1 else fallback for size, s in zip(view.shape[:-1], view.stride()[:-1], strict=True)]
    if not gpu_of(view).has_descriptors:
        return view, *view.shape, *strides
    return TensorDescriptor(view, list(view.shape), [*strides, 1], box)


def describe_pixels(x: torch.Tensor, box: tuple[int, int, int], block: int) -> TensorDescriptor:
    """Returns a descriptor [N, H, W, C] of a `describable` tensor (N, C, H, W), or of a strided slice of one."""
    return describe(x.permute(0, 2, 3, 1), [*box, block])


def aligned_channels(channels: int, itemsize: int) -> int:
    """Rounds `channels` up so that rows are aligned for a descriptor."""
    unit = ALIGNMENT // itemsize
    return -(-channels // unit) * unit


def dot_precision(operand: torch.Tensor) -> str:
    """Returns the `input_precision` of tl.dot. It matters only for fp32, where torch's TF32 switch decides."""
    on_cpu = device_of(operand).type == "cpu" and interpreting()
    return "tf32" if operand.dtype == torch.float32 and tf32_allowed() and not on_cpu else "ieee"


def uses_tensor_cores(operand: torch.Tensor) -> bool:
    return operand.dtype != torch.float32 or dot_precision(operand) == "tf32"
