"""What fuse_ makes of a block, run by our kernels in fp32, against the unfused block in fp64.

A few hundred roundings of 6e-8 stay below CLOSE, relative to the largest value of each result; a mistake is above 1e-3.
"""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.support.surgery_helpers import fused_calls, randn, settle
from tests.support.surgery_models import Block, Generalized, PreBlock, Variant, scaled

from .targets import ieee_fp32  # noqa: F401 (an autouse fixture)

CLOSE = 2e-5
MODELS = {
    "P1, P3, P2": lambda: Block(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
    "P5, P1": PreBlock,
    "conv_add_bn_act": Generalized,
    "conv_bn_scaled_add_act": lambda: Variant(scaled),
}


def step(model, *inputs):
    """{name: tensor} of one training step."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = model(*inputs)
    (y * randn(*y.shape, seed=5).to(y.device, y.dtype)).sum().backward()
    found = {"y": y.detach()} | {f"dinput {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return {name: t.double() for name, t in (found | dict(model.named_buffers())).items()}


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_same_step(name, training, impl, device):
    torch.manual_seed(0)
    original = settle(MODELS[name]()).train(training).float().to(device, memory_format=torch.channels_last)
    golden, fused = copy.deepcopy(original).double(), copy.deepcopy(original)
    operations = len(rir.fuse_(fused, impl=impl).replaced)
    assert operations == len(name.split(", "))
    inputs = [randn(2, 4, 6, 6, seed=i).float().to(device) for i in range(2 if name == "conv_add_bn_act" else 1)]
    with fused_calls(operations):
        ours = step(fused, *inputs)
    for name, exact in step(golden, *(x.double() for x in inputs)).items():
        torch.testing.assert_close(ours[name], exact, rtol=0, atol=CLOSE * max(1.0, exact.abs().max().item()))
