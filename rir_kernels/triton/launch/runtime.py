"""How a kernel is started, and how tensors are handed to it."""

import contextlib
import functools
from collections.abc import Callable

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from rir_kernels.dispatch import tf32_allowed
from rir_kernels.triton.cost import H200, Gpu

ALIGNMENT = 16  # bytes, of a descriptor's base and of every stride but the last

# `rir_kernels.triton.inspect` puts a function here to compile what would be launched
_intercept: Callable | None = None


def launch(kernel, programs: int, *args, **options) -> None:
    """Starts `programs` programs of `kernel` on a one-dimensional grid, which has no practical limit (2^31 - 1)."""
    if _intercept is not None:
        _intercept(kernel, programs, *args, **options)
    else:
        kernel[(programs,)](*args, **options)


@contextlib.contextmanager
def intercepted(function: Callable):
    """Within it, `launch` calls function(kernel, programs, *args, **options) instead of running the kernel."""
    global _intercept
    _intercept, saved = function, _intercept
    try:
        yield
    finally:
        _intercept = saved


def device_guard(tensor: torch.Tensor):
    """Makes the tensor's device the current one: Triton launches on the current device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What tiles are chosen for; the default where no GPU will run them."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.name)


def has_aligned_rows(channels: int, itemsize: int) -> bool:
    """Whether dense channels-last rows of that many channels can be described."""
    return channels * itemsize % ALIGNMENT == 0


def describable(x: torch.Tensor) -> torch.Tensor:
    """x (N, C, H, W) itself where a descriptor can read it in place, else a copy with aligned channels-last rows.

    In place: channels innermost, base and pixel strides multiples of 16 bytes; a slice of channels of a larger
    tensor qualifies. Strides of dimensions of size one mean nothing and are ignored.
    """
    item = x.element_size()
    innermost = x.shape[1] == 1 or x.stride(1) == 1
    pixel_strides = [x.stride(dim) for dim in (0, 2, 3) if x.shape[dim] > 1]
    if innermost and x.data_ptr() % ALIGNMENT == 0 and all(s > 0 and s * item % ALIGNMENT == 0 for s in pixel_strides):
        return x
    n, c, h, w = x.shape
    pitch = _aligned(c, item)
    copy = torch.empty_strided((n, c, h, w), (h * w * pitch, 1, w * pitch, pitch), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def describe(view: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """Descriptor of a view whose last dimension is dense and whose other strides are aligned.

    Strides of dimensions of size one are arbitrary in torch; any multiple of 16 bytes serves for them here.
    """
    fallback = _aligned(view.shape[-1], view.element_size())
    strides = [s if size > 1 else fallback for size, s in zip(view.shape[:-1], view.stride()[:-1], strict=True)]
    return TensorDescriptor(view, list(view.shape), [*strides, 1], box)


def describe_pixels(x: torch.Tensor, box: tuple[int, int, int], block: int) -> TensorDescriptor:
    """Descriptor [N, H, W, C] of a `describable` tensor (N, C, H, W), or of a strided slice of one."""
    return describe(x.permute(0, 2, 3, 1), [*box, block])


def _aligned(channels: int, itemsize: int) -> int:
    unit = ALIGNMENT // itemsize
    return -(-channels // unit) * unit


def pack_weight(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[taps, C_out, C_in] (or [taps, C_in, C_out], a copy) of a weight (C_out, C_in, kh, kw).

    A view of a channels-last parameter with aligned rows; a copy otherwise.
    """
    c_out, c_in, kh, kw = weight.shape
    if dot_precision(weight) == "tf32":
        weight = _round_to_tf32(weight)
    in_place = weight.is_contiguous(memory_format=torch.channels_last) and not transposed
    if in_place and has_aligned_rows(c_in, weight.element_size()) and weight.data_ptr() % ALIGNMENT == 0:
        return weight.as_strided((kh * kw, c_out, c_in), (c_in, kh * kw * c_in, 1))
    source = weight.permute(2, 3, 1, 0) if transposed else weight.permute(2, 3, 0, 1)
    rows, columns = source.shape[2:]
    pitch = _aligned(columns, weight.element_size())
    packed = torch.empty((kh, kw, rows, pitch), dtype=weight.dtype, device=weight.device)
    packed[..., :columns] = source
    return packed.view(kh * kw, rows, pitch)[..., :columns]


def _round_to_tf32(weight: torch.Tensor) -> torch.Tensor:
    """To nearest; the hardware only truncates, which costs 2.2 to 2.7 times the error."""
    bits = weight.contiguous(memory_format=torch.channels_last).view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def dot_precision(operand: torch.Tensor) -> str:
    """The `input_precision` of tl.dot. It matters to fp32 alone, where torch's own TF32 switch decides."""
    return "tf32" if operand.dtype == torch.float32 and tf32_allowed() and not operand.is_cpu else "ieee"


def uses_tensor_cores(operand: torch.Tensor) -> bool:
    return operand.dtype != torch.float32 or dot_precision(operand) == "tf32"
