"""Convolutions of integer codes without any rounding, in floating point and in integers.

    acc[n, o, i, j] = sum over c, u, v of q_x[n, c, i s + u d - p, j s + v d - p] * q_w[o, c, u, v]

Both are one matrix product per group, of the images' patches and the weight. The vendors' convolutions are not asked:
they may be Winograd's or Fourier's, whose intermediate numbers are no integers (NNPACK's is, and is off by several
units). Every partial sum of a matrix product is an integer within K max|q_x| max|q_w|, K = channels per group * kernel
area, so that it is exact in fp32 below 2^24, in fp64 below 2^53, and in int32 below 2^31.
"""

import math

import torch
import torch.nn.functional as F

from rir_kernels.common.spec import ConvBNActSpec


def largest_sum(weight_shape, x_high: int, w_high: int) -> int:
    """A bound of |acc| for a weight (C_out, C_in/groups, kh, kw), or a Linear's, and codes up to these."""
    return math.prod(weight_shape[1:]) * x_high * w_high


def accumulator_dtype(bound: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators up to `bound` for codes in `dtype` (fp32 or fp64): fp32 only where that is exact."""
    return torch.float64 if bound >= 2**24 else dtype


def convolve(x: torch.Tensor, weight: torch.Tensor, spec: ConvBNActSpec, bound: int) -> torch.Tensor:
    """acc (N, C_out, H', W') in `accumulator_dtype`, for integers x (N, C_in, H, W) and weight in fp32 or fp64.

    bound: what |acc| cannot exceed. Gradients are those of the convolution, computed as the vendor does.
    """
    return _Convolution.apply(x, weight, spec, accumulator_dtype(bound, x.dtype))


def convolve_integers(x: torch.Tensor, weight: torch.Tensor, spec: ConvBNActSpec) -> torch.Tensor:
    """acc (N, C_out, H', W') in int32, for x (N, C_in, H, W) in uint8 or int8 and weight in int8."""
    patches, weight, shape = _as_products(x, weight, spec)
    # on a CPU without VNNI the int8 product of the vendor may saturate within
    product = int8_product if x.is_cuda else _int32_product
    return _as_images(torch.stack([product(a, b) for a, b in zip(patches, weight, strict=True)]), shape)


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K) in uint8 or int8 times b (K, N) in int8 -> (M, N) in int32, by the vendor's int8 product."""
    if a.dtype == torch.uint8:  # it takes signed numbers alone: a b = (a - 128) b + 128 (1 b)
        shifted = (a ^ 128).view(torch.int8)
        return int8_product(shifted, b) + 128 * b.sum(0, dtype=torch.int32)
    m, k = a.shape
    n = b.shape[1]
    # what CUDA's asks for: more than 16 rows, the other two sizes multiples of 8
    a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = F.pad(b, (0, -n % 8, 0, -k % 8))
    return torch._int_mm(a.contiguous(), b.contiguous())[:m, :n]


def _int32_product(a, b):
    return a.to(torch.int32) @ b.to(torch.int32)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, spec, dtype):
        ctx.save_for_backward(x, weight)
        ctx.spec = spec
        patches, rows, shape = _as_products(x, weight, spec)
        product_dtype = dtype if _full_precision() else torch.float64
        return _as_images(patches.to(product_dtype) @ rows.to(product_dtype), shape).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        spec = ctx.spec
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad.to(x.dtype), x, weight, None, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups,
            (*ctx.needs_input_grad[:2], False),
        )  # fmt: skip
        return dx, dw, None, None


def _full_precision() -> bool:
    """Whether a product of fp32 matrices is one, whatever torch has been told of TF32 and bf16."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return all(backend.fp32_precision in ("none", "ieee") for backend in backends)


def _as_products(x, weight, spec):
    """Patches (G, N H' W', K), weights (G, K, C_out/G), and (N, H', W')."""
    (pad_h, pad_w), groups = spec.padding, spec.groups
    windows = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    for dim, kernel, stride, dilation in zip((2, 3), weight.shape[2:], spec.stride, spec.dilation, strict=True):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    n, _, h, w, kh, kw = windows.shape
    k = weight.shape[1] * kh * kw
    patches = windows.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2, 5, 6).reshape(groups, n * h * w, k)
    return patches, weight.reshape(groups, weight.shape[0] // groups, k).transpose(1, 2), (n, h, w)


def _as_images(rows, shape):
    """(G, N H' W', C_out/G) -> (N, C_out, H', W')."""
    groups, _, channels = rows.shape
    return rows.transpose(0, 1).reshape(*shape, groups * channels).permute(0, 3, 1, 2)
