"""use_impl reaches the forward that activation checkpointing runs again, in autograd's threads too."""

import contextlib
import gc
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rir_kernels as rir
from rir_kernels.dispatch import preference
from rir_kernels.dispatch.preference import effective_impl, use_impl

reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
DEEP = 64  # levels of backward within backward: beyond 60 torch takes another thread


class _Descend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, levels, call):
        ctx.call = levels, call
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        levels, call = ctx.call
        if levels:
            _in_another_thread(call, levels - 1)
        else:
            call()
        return dy, None, None


def _in_another_thread(call, levels=DEEP):
    """call() in a thread of autograd's, as a GPU's backward runs in one."""
    with torch.enable_grad():
        _Descend.apply(torch.ones(1, requires_grad=True), levels, call).backward()


where = pytest.mark.parametrize("run", [lambda call: call(), _in_another_thread], ids=["here", "worker"])


class _Seen:
    """A function of a tensor that writes down what "auto" means to it, and in which thread."""

    def __init__(self):
        self.names, self.threads = [], []

    def __call__(self, x):
        self.names.append(effective_impl("auto"))
        self.threads.append(threading.get_ident())
        return x.sin()


def _leaf():
    return torch.ones(2, requires_grad=True)


@reentrant
@where
def test_a_forward_that_is_run_again(run, use_reentrant):
    """What held when it was recorded, whatever holds when backward is called; a use_impl within the forward wins."""
    seen = _Seen()

    def within(x):
        with use_impl("reference"):
            x = seen(x)
        return seen(x)

    plain = checkpoint(seen, _leaf(), use_reentrant=use_reentrant)
    with use_impl("torch"):
        under = checkpoint(within, _leaf(), use_reentrant=use_reentrant)
    after = checkpoint(seen, _leaf(), use_reentrant=use_reentrant)
    first, seen.names = seen.names, []
    assert first == ["auto", "reference", "torch", "auto"]
    with use_impl("hybrid"):
        for y in (under, plain, after):
            run(y.sum().backward)
    assert seen.names == ["reference", "torch", "auto", "auto"]
    assert (seen.threads[-1] == threading.get_ident()) == (run is not _in_another_thread)
    assert effective_impl("auto") == "auto"


@pytest.mark.parametrize("outer", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("inner", [True, False], ids=["reentrant", "hooks"])
@where
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # true of the first forward
def test_checkpoints_within_checkpoints(run, inner, outer):
    """A node that is recorded in backward has a number of that thread's: each forward still runs again as it ran."""
    first, second, third = _Seen(), _Seen(), _Seen()

    def middle(x):
        x = checkpoint(first, x.cos(), use_reentrant=inner)
        with use_impl("reference"):
            x = checkpoint(second, x, use_reentrant=inner)
        return checkpoint(third, x, use_reentrant=inner)

    with use_impl("torch"):
        y = checkpoint(middle, _leaf(), use_reentrant=outer)
    run(y.sum().backward)
    for seen, name in ((first, "torch"), (second, "reference"), (third, "torch")):
        assert len(seen.names) >= 2 and set(seen.names) == {name}


@reentrant
def test_layers_of_a_fused_model(use_reentrant):
    """The implementation itself: the first forward and the second are the same, and give its gradients."""
    layers = nn.Sequential(rir.RiRLayer(4, 4), rir.RiRLayer(4, 4))
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with use_impl("reference"):
        y = checkpoint(layers, x, use_reentrant=use_reentrant)
        expected = torch.autograd.grad(layers(x).sum(), x)
    with rir.record_calls() as calls:
        y.sum().backward()
    assert [call.impl for call in calls] == ["reference", "reference"]
    assert torch.equal(x.grad, *expected)


@where
def test_threads_do_not_disturb_each_other(run):
    """Each backward in its own thread is exact; autograd's threads cannot know whose graph it is, and say "auto"."""
    names = ("reference", "torch", "hybrid")
    barrier, found = threading.Barrier(len(names), timeout=30), {}

    def train(name):
        seen = _Seen()
        for _ in range(3):
            with use_impl(name):
                barrier.wait()
                y = checkpoint(seen, _leaf(), use_reentrant=False)
            barrier.wait()
            run(y.sum().backward)
            barrier.wait()
        found[name] = seen.names, effective_impl("auto")

    threads = [threading.Thread(target=train, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = (lambda name: "auto") if run is _in_another_thread else (lambda name: name)
    assert found == {name: ([name, again(name)] * 3, "auto") for name in names}


def test_a_backward_that_fails_is_forgotten():
    def failing(x):
        if torch._C._current_graph_task_id() >= 0:
            effective_impl("auto")
            raise KeyError("in the second forward")
        return x.sin()

    for _ in range(2):
        with use_impl("torch"):
            y = checkpoint(failing, _leaf(), use_reentrant=True)
        with pytest.raises(KeyError):
            y.sum().backward()
        assert effective_impl("auto") == "auto" and not preference._thread._nodes and not preference._thread._around


def test_what_is_remembered_is_bounded():
    """The latest changes; an older graph recomputes as outside of use_impl, and no graph takes no memory."""
    seen = _Seen()
    graphs = []
    for step in range(preference._KEPT):
        with use_impl("torch"), use_impl("reference") if step % 2 else contextlib.nullcontext():
            graphs.append(checkpoint(seen, _leaf(), use_reentrant=False))
    changes = preference._thread.base._changes
    assert len(changes) == preference._KEPT
    before = list(changes)
    for _ in range(10):
        with use_impl("torch"):
            pass
    assert list(changes) == before
    seen.names = []
    for y in (graphs[0], graphs[-2], graphs[-1]):
        y.sum().backward()
    assert seen.names == ["auto", "torch", "reference"]


@reentrant
def test_a_step_leaves_nothing_behind(use_reentrant):
    """What is made for a node goes when its backward ends."""

    def step():
        with use_impl("torch"):
            y = checkpoint(_Seen(), _leaf(), use_reentrant=use_reentrant)
        y.sum().backward()

    def count():
        gc.collect()
        scopes = sum(type(found) is preference._Scope for found in gc.get_objects())
        return scopes, sys.getrefcount(preference._thread.base)

    step()
    before = count()
    for _ in range(20):
        step()
    assert count() == before


def test_a_torch_without_what_this_takes(monkeypatch):
    """Then "auto" means in backward what it does where backward is called."""
    monkeypatch.setattr(preference, "_follows_graphs", False)
    monkeypatch.setattr(preference, "_backward", lambda: -1)
    seen = _Seen()
    with use_impl("torch"):
        y = checkpoint(seen, _leaf(), use_reentrant=False)
    with use_impl("reference"):
        y.sum().backward()
    assert seen.names == ["torch", "reference"] and effective_impl("auto") == "auto"
