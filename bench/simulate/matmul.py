"""Matmuls of Triton whose times are published, compiled for the simulation.

The tutorial runs Gluon code; these are the same loops as Triton's compiler pipelines them: the persistent one is
flattened, so that a tile's operands are loaded while the last one ends.
"""

from types import SimpleNamespace

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.simulate.kernels import kernel_of
from bench.simulate.machine import BASE
from bench.simulate.state import Kernel

SIZE = 8192  # of M and N
TILE = {"BM": 128, "BN": 256, "BK": 64}


@triton.jit
def _place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """Where a tile is: bands of rows share their columns in the L2 cache."""
    num_m = tl.cdiv(M, BM)
    width = BAND * tl.cdiv(N, BN)
    first = tile // width * BAND
    size = min(num_m - first, BAND)
    return first + tile % size, tile % width // size


@triton.jit
def plain(a, b, c, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr):
    m, n = _place(tl.program_id(0), M, N, BM, BN, BAND)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(tl.cdiv(K, BK)):
        acc = tl.dot(a.load([m * BM, k * BK]), b.load([n * BN, k * BK]).T, acc)
    c.store([m * BM, n * BN], acc.to(tl.bfloat16))


@triton.jit
def persistent(
    a, b, c, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    SMS: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), SMS, flatten=True):
        m, n = _place(tile, M, N, BM, BN, BAND)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in tl.range(tl.cdiv(K, BK)):
            acc = tl.dot(a.load([m * BM, k * BK]), b.load([n * BN, k * BK]).T, acc)
        c.store([m * BM, n * BN], acc.to(tl.bfloat16))


def compiled(kind: str, k: int) -> Kernel:
    """The "plain" or the "persistent" matmul of SIZE x SIZE x k in bf16, as it is launched on an H100."""
    boxes = {"a": ("BM", "BK"), "b": ("BN", "BK"), "c": ("BM", "BN")}
    signature = {name: f"tensordesc<bf16[{TILE[rows]},{TILE[cols]}]>" for name, (rows, cols) in boxes.items()}
    signature |= {"M": "i32", "N": "i32"}
    constants = {"K": k, **TILE, "BAND": 8} | ({"SMS": BASE.sms} if kind == "persistent" else {})
    function = persistent if kind == "persistent" else plain
    source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}  # the last as Triton's default up to 3.9
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tensors = {name: SimpleNamespace(shape=(SIZE, n), strides=(n, 1)) for name, n in (("a", k), ("b", k), ("c", SIZE))}
    tiles = SIZE // TILE["BM"] * (SIZE // TILE["BN"])
    return kernel_of(kernel, tensors | {"M": SIZE, "N": SIZE}, constants.get("SMS", tiles))
