"""Which versions the kernels need, and which this package is tested with.

`bench/matrix/` tests them, and docs/versions.md lists the results.
"""

import functools
import importlib.metadata
import re
from collections.abc import Mapping

import torch

from .tracing import not_traced

TRITON_NEEDED, TORCH_NEEDED = (3, 6), (2, 10)

# oldest and newest; releases between these minor versions are assumed to behave like the tested ones
TESTED = {
    "python": ("3.10", "3.13"),
    "torch": ("2.10", "2.14"),
    "triton": ("3.6", "3.9"),
    "numpy": ("1.22", "2.4"),
}


def untested(found: Mapping[str, str]) -> list[str]:
    """Lists the versions in `found`, keyed like TESTED, that lie outside it: "torch 2.15.0 (2.10 to 2.14)".

    A value that does not begin with a number reports a missing package, and is skipped.
    """
    return [
        f"{name} {found[name]} ({oldest} to {newest})"
        for name, (oldest, newest) in TESTED.items()
        if found[name][:1].isdigit() and not numbers(oldest) <= numbers(found[name]) <= numbers(newest)
    ]


@not_traced
def triton_missing() -> str:
    """Why the kernels cannot be imported ("triton >= 3.6 ..., found ..."), or an empty string."""
    if numbers(torch.__version__) < TORCH_NEEDED:
        return f"torch >= {'.'.join(map(str, TORCH_NEEDED))}, found {torch.__version__}"
    needed = f"triton >= {'.'.join(map(str, TRITON_NEEDED))}"
    try:
        import triton
    except Exception as error:  # a broken install raises more than ImportError
        return f"{needed}, which cannot be imported here ({type(error).__name__}: {error}): pip install triton"
    version = _version_of(triton)
    return f"{needed}, found {version}" if numbers(version) < TRITON_NEEDED else ""


@functools.cache
def triton_release() -> tuple[int, ...] | None:
    """(3, 7) for Triton 3.7.1; None if it cannot be imported."""
    try:
        import triton
    except Exception:  # as above
        return None
    return numbers(_version_of(triton))


def _version_of(triton) -> str:
    return getattr(triton, "__version__", None) or importlib.metadata.version("triton")


def numbers(version: str) -> tuple[int, ...]:
    """(3, 7) for "3.7rc1+cu130"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
