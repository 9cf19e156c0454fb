"""Plans under the registered op, as torch.compile and dispatch modes call it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rir_kernels as rir
from rir_kernels.backends import plans
from rir_kernels.common import tracing
from rir_kernels.triton.plan import plan

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture
def recorded(monkeypatch):
    """A list that grows by one with each plan; nothing is known at the start."""
    monkeypatch.setattr(plans, "_repeated", plans.Kinds())
    made, record = [], plan.record
    monkeypatch.setattr(plan, "record", lambda *args: made.append(1) or record(*args))
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_the_op_repeats_its_plans(target, recorded):
    """One plan a direction for each kind of call, and the bits of launches that are made anew."""
    layer = rir.ConvBNAct(8, 8, 3, impl="triton", device=target[0], dtype=target[1])
    scaled = rir.ConvBNAct(8, 8, 3, impl="triton", branch_scale=0.5, device=target[0], dtype=target[1])
    for module in (layer, scaled):  # alike but for the options
        module.to(memory_format=torch.channels_last).load_state_dict(layer.state_dict())
    calls = {"first": (layer, 2), "again": (layer, 2), "batch": (layer, 3), "options": (scaled, 2)}
    kinds = 0
    for seed, (name, (module, batch)) in enumerate(calls.items()):
        x = rand((batch, 8, 4, 4), target, seed=seed).requires_grad_()
        found = []
        for mode in (_Mode, tracing.no_replay):
            module.bn.reset_running_stats()
            with mode():
                y = module(x)
                gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()])
            found.append([y, *gradients, module.bn.running_mean, module.bn.running_var])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), name
        kinds += name != "again"
        assert len(recorded) == 2 * kinds, name


def test_nothing_learnt_apart_is_kept():
    """And what was known before is known again."""
    kinds = plans.Kinds()
    kinds.remember("before", 1)
    with plans.Kinds.apart():
        assert not kinds
        kinds.remember("within", 2)
    assert kinds == {"before": 1}
