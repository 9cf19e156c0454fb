"""Where and in what precision the kernel tests run, and what error that precision allows."""

from itertools import product

import pytest
import torch

from tests.support.emulation import gpu


def _target(device, name, *marks):
    place, where = (gpu(), pytest.mark.gpu) if device == "cuda" else (torch.device(device), pytest.mark.interpreter)
    return pytest.param((place, getattr(torch, name)), marks=[where, *marks], id=f"{device}-{name}")


# the interpreter's bf16 products are wrong (triton multiplies the raw bits), so bf16 is tested on a GPU alone
# and so, for the short suite, is fp16: on a GPU that may be emulated, where the code is what Triton compiles
TARGETS = [_target("cpu", "float32"), _target("cpu", "float16", pytest.mark.long)] + [
    _target("cuda", name) for name in ("bfloat16", "float16", "float32")
]
INTERPRETED_HALF = _target("cpu", "float16")  # for what fp32 cannot show, and a GPU's code does not need to


def crossed(share, **axes):
    """Each target with each combination of the axes' named values: one in `share`, diagonally, and the others long."""
    params = []
    for (number, target), *values in product(enumerate(TARGETS), *(enumerate(axis.items()) for axis in axes.values())):
        is_long = (number + sum(index for index, _ in values)) % share != 0
        marks = [*target.marks, *[pytest.mark.long] * is_long]
        name = "-".join([target.id, *(name for _, (name, _) in values)])
        params.append(pytest.param(*target.values, *(value for _, (_, value) in values), marks=marks, id=name))
    return pytest.mark.parametrize(["target", *axes], params)


@pytest.fixture(autouse=True)
def ieee_fp32(monkeypatch):
    """fp32 means fp32 here: TF32 has a test of its own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def rand(shape, target, *, seed, scale=1.0, channels_last=True):
    """Normal values rounded to the target's dtype, the same on every device."""
    device, dtype = target
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    values = values.to(device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else values


def small_integers(shape, target, *, seed, density=0.3):
    """Sparse -1, 0, 1: every partial sum of a convolution is exact in fp16 and fp32, whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    values = values * (torch.rand(shape, generator=generator) < density)
    device, dtype = target
    return values.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


def assert_close(ours, golden, dtype, *, terms, name=""):
    """|ours - golden| within what rounding allows.

    The result is rounded once to `dtype` (eps * |golden|), and summed in fp32 from `terms` products of inputs that are
    exact: the error of such a sum grows like sqrt(terms) * eps32 * scale. Factor 4 for the tails.
    """
    golden = golden.to(torch.float64)
    error = (ours.to(torch.float64) - golden).abs()
    scale = golden.abs().max().item()
    allowed = torch.finfo(dtype).eps * golden.abs() + 4 * terms**0.5 * torch.finfo(torch.float32).eps * max(scale, 1e-3)
    worst = (error - allowed).max().item()
    assert worst <= 0, f"{name}: error {error.max().item():.3e} beyond the allowed by {worst:.3e} (scale {scale:.3e})"
