"""The compiled kernels of one layer against fp64: a shape for each variant, and with --long the whole table."""

import pytest
import torch

from rir_kernels.triton.tiling.tile import ConvConfig

from .judge import assert_no_race
from .layer import OPERATIONS, Layer

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("tf32")]

BF16, FP16, TF32 = torch.bfloat16, torch.float16, torch.float32
# dtype, C_in, C_out, size, images that fill the boxes of the tiles of a batch of 256, kernel, stride
VARIANTS = {
    "one box": ((BF16, 64, 64, 8, 7, 3, 1), ("train", "dsums", "wgrad", "norm")),
    "rows": ((BF16, 96, 96, 32, 2, 3, 1), ("train",)),
    "groups of channels": ((BF16, 192, 192, 16, 1, 3, 1), ("train", "dsums")),
    "folded": ((BF16, 16, 16, 32, 1, 3, 1), ("train", "infer", "dgrad", "wgrad")),
    "stride 2": ((BF16, 96, 192, 16, 1, 3, 2), ("train", "dgrad", "wgrad")),
    "odd channels": ((BF16, 3, 21, 9, 2, 3, 1), ("train", "infer", "dgrad", "wgrad")),
    "1x1, stride 2": ((BF16, 48, 96, 16, 1, 1, 2), ("train", "dgrad", "wgrad")),
    "fp16": ((FP16, 32, 32, 16, 3, 3, 1), ("train", "infer", "dsums", "wgrad", "norm")),
    "TF32": ((TF32, 64, 64, 8, 2, 3, 1), ("train", "infer", "dsums", "wgrad", "norm")),
}
CASES = [pytest.param(*shape, operation, id=f"{name}-{operation}")
         for name, (shape, operations) in VARIANTS.items() for operation in operations]  # fmt: skip

TABLE = [
    (96, 96, 32, 3, 3, 1), (192, 192, 16, 1, 3, 1), (384, 384, 8, 3, 3, 1), (48, 48, 32, 2, 3, 1),
    (16, 16, 32, 1, 3, 1), (32, 32, 16, 3, 3, 1), (64, 64, 8, 7, 3, 1), (64, 64, 56, 7, 3, 1), (128, 128, 28, 3, 3, 1),
    (256, 256, 14, 3, 3, 1), (512, 512, 7, 3, 3, 1), (3, 96, 32, 2, 3, 1), (96, 192, 32, 1, 3, 2),
    (192, 384, 16, 1, 3, 2), (48, 96, 32, 1, 1, 2), (384, 10, 8, 2, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype, c_in, c_out, size, n, kernel, stride, operation", CASES)
def test_variants(dtype, c_in, c_out, size, n, kernel, stride, operation):
    Layer(dtype, c_in, c_out, size, n, kernel, stride).check(operation)


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16, TF32], ids=["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("shape", TABLE, ids=lambda s: f"{s[0]}-{s[1]}@{s[2]} {s[4]}x{s[4]}/{s[5]}")
def test_table(shape, dtype, operation):
    Layer(dtype, *shape).check(operation)


# one that the rule may choose on a GPU with other prices: a pixel of many images, and no taps that read padding
SKIPS = ConvConfig((16, 1, 1), block_c=64, block_k=64, num_warps=4, num_stages=3, skips=True)


@pytest.mark.parametrize("operation", ["train", "dgrad", "dsums"])
def test_tiles_that_skip_padding(operation):
    Layer(BF16, 64, 64, 4, 20, tile=SKIPS).check(operation)


# late timing: minutes for wide tiles
LATE = [((BF16, 24, 40, 6, 3, 3, 1), ("train", "dgrad", "wgrad", "norm"))]
LATE_LONG = [
    ((BF16, 64, 64, 8, 7, 3, 1), OPERATIONS[1:]), ((BF16, 16, 16, 32, 1, 3, 1), ("train", "dsums", "wgrad")),
    ((BF16, 192, 192, 16, 1, 3, 1), ("train", "infer", "dsums")), ((BF16, 96, 192, 16, 1, 3, 2), ("train", "dgrad")),
    ((TF32, 64, 64, 8, 2, 3, 1), ("train", "dgrad", "wgrad")), ((FP16, 64, 64, 8, 2, 3, 1), ("train", "wgrad")),
]  # fmt: skip
LATE_CASES = [
    pytest.param(shape, operation, seed, marks=[pytest.mark.long] * is_long,
                 id=f"{str(shape[0])[6:]}-{shape[1]}-{shape[2]}@{shape[3]}-{operation}-{seed}")
    for is_long, cases, seeds in ((False, LATE, (1,)), (True, LATE_LONG, (1, 2, 3)))
    for shape, operations in cases for operation in operations for seed in seeds
]  # fmt: skip


@pytest.mark.parametrize("shape, operation, seed", LATE_CASES)
def test_nothing_depends_on_when_things_happen(shape, operation, seed, emulator):
    layer = Layer(*shape, batch=0 if shape[1] == 24 else 256)
    with emulator.late(seed):
        layer.check(operation)
    assert_no_race(emulator.records)


@pytest.mark.long
@pytest.mark.parametrize("case", range(100))
def test_shapes_that_nobody_thought_of(case, emulator):
    draw = torch.Generator().manual_seed(case)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    kernel, stride = ((1, 1), (3, 1), (3, 1), (3, 2), (1, 2))[integer(0, 4)]
    shape = integer(1, 80), integer(1, 80), integer(1, 13), integer(1, 5), kernel, stride
    layer = Layer((BF16, FP16, TF32)[integer(0, 2)], *shape, batch=(0, 256)[integer(0, 1)], seed=case)
    late = integer(0, 3) == 0
    for operation in {OPERATIONS[integer(1, len(OPERATIONS) - 1)] for _ in range(3)}:
        if late:
            with emulator.late(case):
                layer.check(operation)
        else:
            layer.check(operation)
    assert_no_race(emulator.records)
