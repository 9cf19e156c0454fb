"""Autocast around fused models: what is convolved takes its dtype, norms and their statistics stay in fp32."""

import copy

import pytest
import torch

import rir_kernels as rir
from tests.pytorch.networks import BLOCKS, OPERATIONS, Bottleneck, images, resnet, twins
from tests.support.helpers import assert_within_budget
from tests.support.surgery_helpers import fused_calls, randn, settle

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
MODELS = {"resnet": resnet, "bottleneck": lambda: resnet(Bottleneck)} | {
    name: lambda make=make: settle(make()) for name, make in BLOCKS.items()
}


def step(model, x, dtype, enabled=True):
    """({name: tensor} of one training step in fp64, the dtypes by name)."""
    with torch.autocast("cpu", dtype, enabled):
        y = model(x)
    (y.double() * randn(*y.shape, seed=5)).sum().backward()
    found = {"y": y.detach()} | {f"d{name}": p.grad for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    return {name: t.double() for name, t in found.items()}, {name: t.dtype for name, t in found.items()}


@halves
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_as_near_to_fp64_as_the_unfused_model(name, training, dtype):
    """Budget: twice the error of the unfused model under the same autocast, and a rounding: see assert_within_budget.

    The images come in autocast's dtype. An identity in fp32 would raise the unfused sum to fp32, where the fused
    operation returns autocast's dtype, as fuse_ documents: then they differ by more than a rounding.
    """
    torch.manual_seed(0)  # with others a value within a rounding of zero may fall on the other side of the ReLU
    original = MODELS[name]().train(training)
    golden, original = copy.deepcopy(original).float().double(), original.float()
    fused = copy.deepcopy(original)
    rir.fuse_(fused)
    x = images(8, dtype) if "net" in name or "neck" in name else randn(8, 4, 6, 6).to(dtype)
    exact, _ = step(golden, x.double(), dtype, enabled=False)
    torchs, dtypes = step(original, x, dtype)
    ours, found = step(fused, x, dtype)
    assert_within_budget(ours, torchs, exact, dtype)
    assert found.pop("y") in (dtype, dtypes.pop("y"))
    assert found == dtypes  # gradients, statistics and counters


def test_every_operation_is_fused():
    fused, _ = twins(resnet().float())
    with torch.autocast("cpu", torch.bfloat16), fused_calls(OPERATIONS):
        fused(images().float())


def test_disabled_within():
    fused, original = twins(resnet().float().eval())
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        outside = fused(x)
        with torch.autocast("cpu", enabled=False):
            inside = fused(x)
    assert outside.dtype == torch.bfloat16 and torch.equal(inside, fused(x))
    # fp32, outputs of order one to ten
    torch.testing.assert_close(inside, original(x), rtol=1e-4, atol=1e-4)


class _Infinite(torch.autograd.Function):
    """The identity, whose gradient overflows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.full_like(dy, float("inf"))


def test_infinite_gradients_in_a_fused_model_are_those_of_the_unfused():
    fused, original = twins(resnet().float())
    for model in (fused, original):
        with torch.autocast("cpu", torch.float16):
            y = model(images().float())
        _Infinite.apply(y).float().sum().backward()
    for ours, expected in zip(fused.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours.grad.isfinite(), expected.grad.isfinite()) and not ours.grad.isfinite().all()
