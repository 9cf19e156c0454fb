"""How far a result may be from the exact one: one rounding of its type, and what sums in fp32 lose."""

import torch

HALF_UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}
SMALLEST = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150}  # half a subnormal's unit
ACCUMULATION = 2.0**-19  # of the sum of the absolute terms: what sums of some thousand in fp32 may lose, in any order


def excess(got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | None = None) -> float:
    """The largest error, in units of what is allowed.

    exact: in fp64. terms: the sum of the absolute values of which it is the sum; itself where it is no sum.
    """
    assert got.shape == exact.shape
    error = (got.double() - exact).abs()
    # a unit of the result is up to twice one of the value below the power of two that it may be rounded to
    rounding = 2 * HALF_UNIT[got.dtype] * exact.abs() + SMALLEST[got.dtype]
    sums = ACCUMULATION * (exact.abs() if terms is None else terms.double())
    return (error / (rounding + sums)).nan_to_num(nan=float("inf")).max().item() if error.numel() else 0.0


def assert_exact(name: str, got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | None = None) -> None:
    found = excess(got, exact, terms)
    assert found <= 1, f"{name}: the error is {found:.2f} times what one rounding and sums in fp32 explain"


def assert_no_race(records) -> None:
    """Of launches in late timing: nothing was reported but what is known to be harmless."""
    for record in records:
        faults = [text for text in record.reports if not text.startswith("note: ")]
        assert not faults, f"{record.name}: {'; '.join(faults[:4])}"
