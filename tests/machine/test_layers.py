"""Whole layers in bf16, forward and backward: launched one by one, and by the plan that a repeated call leaves."""

import pytest
import torch

from rir_kernels.common import tracing
from rir_kernels.functional import conv_bn_act
from tests.support.helpers import make_call, run

from .layer import tiles_of

pytestmark = pytest.mark.machine

CASES = {
    "residual of fewer channels": {"channels": (64, 64), "size": (8, 8), "residuals": (24,), "training": True},
    "two residuals after the norm, scaled, bias": {
        "channels": (64, 64), "size": (8, 8), "residuals": (64, 40), "residual_at": "post_norm", "branch_scale": 0.5,
        "bias": True, "training": True,
    },
    "odd channels": {"channels": (19, 21), "size": (9, 9), "residuals": (7,), "training": True},
    "odd channels, stride 2": {"channels": (5, 13), "size": (9, 9), "stride": 2, "training": True},
    "evaluation": {"channels": (64, 64), "size": (8, 8), "residuals": (64,)},
    "1x1, stride 2": {"channels": (24, 40), "size": (10, 10), "kernel": 1, "padding": 0, "stride": 2, "training": True},
    "no activation, no affine": {
        "channels": (40, 72), "size": (11, 11), "activation": None, "affine": "none", "training": True,
    },
    "tiles of a large batch": {"channels": (16, 16), "size": (32, 32), "training": True, "tiles": 256},
}  # fmt: skip
ROUNDED = 2.0**-8  # of what is largest: one rounding to bf16, and one of what it was computed from


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_bf16_allows_and_the_same_by_the_plan(name, emulator):
    case = {"batch": 2, "padding": 1, "dtype": torch.bfloat16, "norm_dtype": torch.float32, **CASES[name]}
    batch = case.pop("tiles", 0)
    tensors, options = make_call(**case)
    last = torch.channels_last
    tensors = {key: t.contiguous(memory_format=last) if t.dim() == 4 else t for key, t in tensors.items()}

    def step():
        emulator.records.clear()
        with tiles_of(batch):
            return run(conv_bn_act, tensors, options | {"impl": "triton"}, dy)

    shape = run(conv_bn_act, tensors, options | {"impl": "reference"}, dtype=torch.float64)["y"].shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    with tracing.no_replay():  # launch by launch
        found = step()
    launches = [(record.name, record.programs) for record in emulator.records]
    _assert_exact(found, tensors, options, dy)
    for _ in range(3):  # recorded at the second step at the latest
        again = step()
    assert [(record.name, record.programs) for record in emulator.records] == launches
    for key, value in found.items():
        # the running statistics by torch's operators, or in the kernel: an ulp apart at times
        torch.testing.assert_close(again[key], value, rtol=2.0**-22 * key.startswith("running"), atol=0, msg=key)


def _assert_exact(found, tensors, options, dy):
    # on which side of zero an input of the ReLU falls is a matter of rounding: the kernels' own mask
    relu = options.get("activation", "relu") == "relu"
    mask = found["y"] > 0 if relu else torch.ones_like(dy, dtype=torch.bool)
    exact = options | {"impl": "reference", "activation": None}
    golden = run(conv_bn_act, tensors, exact, (dy * mask).double(), torch.float64)
    golden["y"] = golden["y"].relu() if relu else golden["y"]
    for key, value in found.items():
        # what the bias adds the batch's mean takes away: its gradient is zero, and what is there is rounding
        scale = golden["dbn_bias"] if key == "dbias" and options.get("training") else golden[key]
        error = (value.double() - golden[key]).abs().max()
        assert error <= 2 * ROUNDED * scale.abs().max(), f"{key}: {error / scale.abs().max():.1e} of the largest"
