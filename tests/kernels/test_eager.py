"""The fast path of eager calls (plan replay): taken only where it may be, and with the results of the regular path."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rir_kernels as rir
from rir_kernels.backends import plans
from rir_kernels.common import tracing
from rir_kernels.dispatch import plan_cache
from rir_kernels.triton.plan import plan

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture
def taken(monkeypatch):
    """A list that grows by one with each call that replays a plan; nothing is known at the start."""
    monkeypatch.setattr(plan_cache, "_planned", plans.Kinds())
    calls = []
    run = plan.Plan.__call__
    monkeypatch.setattr(plan.Plan, "__call__", lambda *args: calls.append(1) or run(*args))
    return calls


def _layer(target, channels=8, **options):
    options = {"impl": "triton", "device": target[0], "dtype": target[1]} | options
    return rir.RiRLayer(channels, channels, **options).to(memory_format=torch.channels_last)


@targets
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_both_ways_agree(target, training, taken):
    """Outputs, gradients and the norm's state, over calls whose tensors lie elsewhere each time."""
    layers = [_layer(target).train(training) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for seed in range(3):
        results = []
        for layer, way in zip(layers, (contextlib.nullcontext, tracing.no_replay), strict=True):
            x = rand((2, 8, 4, 4), target, seed=seed).requires_grad_(training)
            with way(), torch.set_grad_enabled(training):
                y = layer(x)
            grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()]) if training else ()
            results.append([y, *grads])
        for short, long in zip(*results, strict=True):
            assert torch.equal(short, long) and short.stride() == long.stride()
        # updated by a kernel here, by torch's operators there: the order of three roundings may differ
        state, expected = (layer.bn.state_dict() for layer in layers)
        torch.testing.assert_close(state, expected, rtol=4 * 2**-24, atol=0)
        assert state["num_batches_tracked"] == (seed + 1 if training else 0)
    # gradients have plans too, by either way: the op's backward runs where nothing watches any more
    assert len(taken) == (9 if training else 3)


@targets
def test_one_plan_a_kind(target, taken):
    """Whatever changes what is checked, chosen or launched makes another kind."""
    layer = _layer(target)
    x = rand((2, 8, 4, 4), target, seed=1)
    calls = {
        "first": lambda: layer(x),
        "batch": lambda: layer(rand((3, 8, 4, 4), target, seed=1)),
        "format": lambda: layer(x.contiguous()),
        "slice": lambda: layer(rand((2, 16, 4, 4), target, seed=1)[:, :8]),
        "no gradient": torch.no_grad()(lambda: layer(x)),
        "outer": lambda: layer(x, outer=x),
        "narrower outer": lambda: layer(x, outer=x[:, :4]),
        "other weight format": lambda: _layer(target).to(memory_format=torch.contiguous_format)(x),
        "evaluation": lambda: layer.eval()(x),
        "no norm parameters": lambda: rir.functional.conv_bn_act(
            x,
            layer.weight,
            running_mean=layer.bn.running_mean,
            running_var=layer.bn.running_var,
            padding=1,
            impl="triton",
        ),
        "scale": lambda: _layer(target, branch_scale=0.5)(x),
    }
    for number, (name, call) in enumerate(calls.items(), 1):
        call()
        assert len(plan_cache._planned) == number, name
    assert len(taken) == len(calls) and None not in plan_cache._planned.values()
    layer.train()
    layer(rand((2, 8, 4, 4), target, seed=2))
    assert len(plan_cache._planned) == len(calls)


@targets
def test_a_residual_in_another_format_than_x(target, taken):
    layer = _layer(target)
    x, outer = rand((2, 8, 4, 4), target, seed=1), rand((2, 8, 4, 4), target, seed=2)
    for image, residual in ((x, outer.contiguous()), (x.contiguous(), outer)):
        results = []
        for tensors in ((image, residual), (x, outer)):
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = layer(leaves[0], outer=leaves[1])
            assert y.stride() == tensors[0].stride()
            results.append([y, *torch.autograd.grad(y.sum(), [*leaves, *layer.parameters()])])
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)
    assert len(taken) == 8


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator.name())
        return operator(*args, **(kwargs or {}))


@targets
def test_who_watches_sees_the_op(target, taken):
    """By a plan as well: what watches stands around the op, not within it."""
    layer = _layer(target)
    x = rand((2, 8, 4, 4), target, seed=1)
    layer(x)
    with _Watch() as watch:
        layer(x)
    assert "rir_kernels::conv_bn_act" in watch.seen
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        layer(x)
    assert len(taken) == 3


@targets
def test_mistakes_are_still_refused_after_a_good_call(target, taken):
    layer = _layer(target)
    x = rand((2, 8, 4, 4), target, seed=1)
    layer(x)
    with pytest.raises(ValueError, match="channels"):
        layer(rand((2, 9, 4, 4), target, seed=1))
    with pytest.raises(TypeError, match="share a dtype"):
        layer(x.double())
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        layer(x.float().cpu().numpy())
    layer.bn.eps = -1.0
    with pytest.raises(ValueError, match="eps"):
        layer(x)
    assert len(taken) == 1


@targets
def test_unaligned_memory_replays_no_plan(target, taken):
    flat = rand((2 * 8 * 16 + 1,), target, seed=1)
    x = flat[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2)
    layer = _layer(target).eval()
    with torch.no_grad():
        y = layer(x)
        assert taken == []
        assert torch.equal(y, layer(x.clone(memory_format=torch.channels_last)))
    assert len(taken) == 1


@targets
def test_what_cannot_be_planned_is_recorded_once(target, taken, monkeypatch):
    """By the call and by the op within it: later calls of the kind record nothing."""
    recorded = []
    record = plan.record
    monkeypatch.setattr(plan, "record", lambda *args: recorded.append(1) or record(*args))
    monkeypatch.setattr(plan, "_ALLOCATIONS", frozenset())
    layer, x = _layer(target).eval(), rand((2, 8, 4, 4), target, seed=1)
    with torch.no_grad():
        results = [layer(x) for _ in range(3)]
    assert len(recorded) == 2 and taken == []
    assert torch.equal(results[0], results[2])


@targets
def test_versions_of_the_statistics(target, taken):
    """Those of torch's own batch norm, which counts a new batch and no new statistics: who keeps them is not told."""
    layer, norm = _layer(target), torch.nn.BatchNorm2d(8, device=target[0])
    for _ in range(2):  # the call that leaves the plan, and one that follows it
        before = [
            (buffer._version, other._version) for buffer, other in zip(layer.buffers(), norm.buffers(), strict=True)
        ]
        layer(rand((2, 8, 4, 4), target, seed=1))
        norm(torch.zeros(2, 8, 1, 1, device=target[0]))
        after = [
            (buffer._version, other._version) for buffer, other in zip(layer.buffers(), norm.buffers(), strict=True)
        ]
        grown = [(ours - a, torchs - b) for (ours, torchs), (a, b) in zip(after, before, strict=True)]
        assert grown == [(0, 0), (0, 0), (1, 1)]


@targets
def test_cumulative_average_and_untracked_statistics(target, taken):
    layer = _layer(target, momentum=None)
    expected = torch.nn.BatchNorm2d(8, momentum=None, device=target[0])
    for seed in range(3):
        x = rand((2, 8, 4, 4), target, seed=seed)
        layer(x)
        z = torch.nn.functional.conv2d(x.double(), layer.weight.double(), padding=1)
        z[:, :4] += x[:, :4]
        expected.double()(z)
    # fp32 sums over 32 pixels of values near one, rounded to the buffers' dtype three times
    close = {"rtol": max(1e-3, 1.5 * torch.finfo(layer.bn.running_var.dtype).eps), "atol": 1e-3}
    torch.testing.assert_close(layer.bn.running_mean.double(), expected.running_mean, **close)
    torch.testing.assert_close(layer.bn.running_var.double(), expected.running_var, **close)
    assert layer.bn.num_batches_tracked == 3
    layer.bn = torch.nn.BatchNorm2d(8, track_running_stats=False, device=target[0])
    layer(x)
    assert len(taken) == 4


@pytest.mark.interpreter
def test_a_repeated_call_is_a_short_one(taken):
    """From the function to its plan: so many Python frames of ours, and none that checks or chooses."""
    package = Path(rir.__file__).parent
    target = torch.device("cpu"), torch.float32
    x, weight = rand((2, 8, 4, 4), target, seed=1), rand((8, 8, 3, 3), target, seed=2)
    norm = {name: torch.ones(8) for name in ("bn_weight", "bn_bias", "running_mean", "running_var")}
    files: list[Path] = []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            files.append(path.relative_to(package))

    for profile in (None, None, note):
        sys.setprofile(profile)
        try:
            with torch.no_grad():
                rir.functional.conv_bn_act(x, weight, **norm, padding=1, impl="triton")
        finally:
            sys.setprofile(None)
    assert len(taken) == 3
    before = files[: files.index(Path("triton/plan/plan.py"))]
    assert len(before) <= 20
    assert not {"dispatch/tensors.py", "dispatch/choose.py"} & {str(path) for path in before}
