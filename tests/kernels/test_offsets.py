"""Offsets in tensors of more than 2^31 elements: they need 64 bits.

The memory is a file with holes: of its gigabytes only the pages that hold a pixel are there. Where an offset that wraps
would lead is within it too, so that a fault is a wrong number and no crash.
"""

import pytest
import torch
import triton
import triton.language as tl

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.kernels.conv import pixels
from rir_kernels.triton.tiling.gpus import Gpu

from .targets import INTERPRETED_HALF, TARGETS, ieee_fp32, small_integers  # noqa: F401 (an autouse fixture)

# half of the bytes, and in the interpreter alone: a GPU's memory has no holes
target = pytest.mark.parametrize("target", [INTERPRETED_HALF])
FAR = 2**31


@pytest.fixture
def spread(tmp_path):
    """A function: the tensor's numbers again, at strides of its own in memory that goes on FAR in both directions."""

    def place(tensor, strides):
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        size = FAR + reach + 1
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=size, dtype=tensor.dtype)
        return memory.as_strided(tensor.shape, strides, FAR).copy_(tensor)

    return place


@target
def test_rows_of_a_norm(target, spread):
    from rir_kernels.triton.launch import batchnorm

    residual = small_integers((1, 8, 1, 12), target, seed=1)
    pitch = FAR // 8
    far = spread(residual, (12 * pitch, 1, 12 * pitch, pitch))
    z = small_integers((1, 8, 1, 12), target, seed=2)
    statistics = batchnorm.Statistics(*(torch.full((8,), value) for value in (0.0, 1.0, 1.0)))
    spec = ConvBNActSpec(post_norm=True, activation=None)
    y = batchnorm.bn_apply(z, statistics, gamma=None, beta=None, residuals=[far], spec=spec)
    assert torch.equal(y, z + residual)


@target
def test_boxes_by_pointers(target, spread, monkeypatch):
    from rir_kernels.triton.launch import conv, runtime

    for module in (conv, runtime):
        monkeypatch.setattr(module, "gpu_of", lambda tensor: Gpu(108, 163 * 1024, arch=80))
    x, weight = small_integers((3, 8, 1, 2), target, seed=1), small_integers((8, 8, 1, 1), target, seed=2)
    far = spread(x, (FAR // 2, 1, 16, 8))
    z, _ = conv.conv_train(far, weight, bias=None, residuals=(), spec=ConvBNActSpec())
    assert torch.equal(z, torch.nn.functional.conv2d(x, weight))


@triton.jit
def _offsets_fwd_kernel(out_ptr, N, H, W, stride_n, BOX: tl.constexpr):
    _, offset = pixels(0, 0, 0, N, H, W, stride_n, 8, 1, BOX)
    tl.store(out_ptr + tl.arange(0, BOX[0] * BOX[1] * BOX[2]), offset)


@pytest.mark.parametrize("target", TARGETS[:1] + TARGETS[2:3])
def test_pixels_that_are_stored(target):
    offsets = torch.empty(8, dtype=torch.int64, device=target[0])
    _offsets_fwd_kernel[(1,)](offsets, 4, 1, 2, FAR // 2, BOX=(4, 1, 2))
    assert offsets.tolist() == [image * FAR // 2 + column for image in range(4) for column in range(2)]
