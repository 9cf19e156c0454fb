"""What is changed in Triton's interpreter changes no result, and no error."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import rir_kernels.triton.launch.runtime  # noqa: F401, which patches it
from rir_kernels.common.switches import interpreting

pytestmark = pytest.mark.interpreter
MOST = 2**31 - 1


@triton.jit
def _sum(x, y):
    return x + y


@triton.jit
def _int_kernel(x_ptr, y_ptr, OP: tl.constexpr):
    x, y = tl.load(x_ptr + tl.arange(0, 2)), tl.load(y_ptr + tl.arange(0, 2))
    if OP == "add":
        z = _sum(x, y)
    elif OP == "sub":
        z = x - y
    else:
        z = x * y
    tl.store(x_ptr + tl.arange(0, 2), z)


CASES = {
    "add": (MOST - 1, 1, MOST),
    "sub": (-MOST, 1, -MOST - 1),
    "mul": (2**15, -(2**16), -MOST - 1),
    "add, too large": (MOST, 1, -MOST - 1),
    "sub, too small": (-MOST, 2, MOST),
    "mul, too large": (2**15, 2**16, -MOST - 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_integers(case):
    """They wrap around, as on a GPU."""
    x, y, z = (torch.tensor([0, value], dtype=torch.int32) for value in CASES[case])
    _int_kernel[(1,)](x, y, case.partition(",")[0])
    assert torch.equal(x, z)


def test_the_language_is_restored_after_a_launch():
    before = {name: getattr(tl, name) for name in ("load", "program_id", "range", "reduce")}
    x = torch.ones(2, dtype=torch.int32)
    _int_kernel[(1,)](x, x.clone(), "add")
    assert all(getattr(tl, name) is value for name, value in before.items()) and tl.core.is_builtin(tl.load)
    assert interpreting()


def test_a_scalar_comparison_makes_a_mask():
    """Of booleans: Triton 3.9 takes no integers for one."""
    builder, three = interpreter.interpreter_builder, interpreter.TensorHandle(np.array([3], np.int32), tl.int32)
    for compare, expected in ((builder.create_icmpEQ, True), (builder.create_icmpSLT, False)):
        mask = builder.create_splat(tl.block_type(tl.int1, [4]), compare(three, three)).data
        assert mask.dtype == bool and mask.tolist() == [expected] * 4
