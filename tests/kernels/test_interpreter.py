"""What is changed in Triton's interpreter changes no result, and no error."""

import pytest
import torch
import triton
import triton.language as tl

import rir_kernels.triton.launch.runtime  # noqa: F401, which patches it
from rir_kernels.dispatch import interpreting

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


INSIDE = {"add": (MOST - 1, 1, MOST), "sub": (-MOST, 1, -MOST - 1), "mul": (2**15, -(2**16), -MOST - 1)}


@pytest.mark.parametrize("op", INSIDE)
def test_a_result_that_int32_just_holds(op):
    x, y, z = (torch.tensor([0, value], dtype=torch.int32) for value in INSIDE[op])
    _int_kernel[(1,)](x, y, op)
    assert torch.equal(x, z)


OUTSIDE = {"add": (MOST, 1), "sub": (-MOST, 2), "mul": (2**15, 2**16)}


@pytest.mark.parametrize("op", OUTSIDE)
def test_an_overflow_is_an_error(op):
    x, y = (torch.tensor([0, value], dtype=torch.int32) for value in OUTSIDE[op])
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"int32 overflow detected for operation {op}"):
        _int_kernel[(1,)](x, y, op)


def test_the_language_is_restored_after_a_launch():
    before = {name: getattr(tl, name) for name in ("load", "program_id", "range", "reduce")}
    x = torch.ones(2, dtype=torch.int32)
    _int_kernel[(1,)](x, x.clone(), "add")
    assert all(getattr(tl, name) is value for name, value in before.items()) and tl.core.is_builtin(tl.load)
    assert interpreting()
