"""record_calls lists the operations that ran: names, shapes, the implementation, and the reason for it."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rir_kernels as rir
from rir_kernels.backends import aten
from rir_kernels.common import devices, switches, warn
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch import calls as recording
from rir_kernels.dispatch import choose
from rir_kernels.functional import conv_bn_act, norm_act
from tests.pytorch.networks import images, resnet_twins

CPU = "x is not on a CUDA device"
X, WEIGHT = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3, 3, 3)
X4 = torch.ones(2, 4, 5, 5)


def seen(calls):
    return [(call.name, call.shape, call.impl, call.fused, call.reason) for call in calls]


def call(impl="auto", x=X):
    return conv_bn_act(x, WEIGHT, training=True, impl=impl)


def test_functions_outside_of_modules():
    """An explicit implementation needs no reason, "auto" gives one, and use_impl is one."""
    with rir.record_calls() as calls:
        call("reference")
        call("torch")
        norm_act(X, training=True)
        with rir.use_impl("reference"):
            call()
    assert seen(calls) == [
        ("conv_bn_act", (2, 3, 5, 5), "reference", True, ""),
        ("conv_bn_act", (2, 3, 5, 5), "torch", True, ""),
        ("norm_act", (2, 3, 5, 5), "torch", True, CPU),
        ("conv_bn_act", (2, 3, 5, 5), "reference", True, 'use_impl("reference")'),
    ]


def net():
    """Our modules, and a user's module that calls the function."""

    class Calls(nn.Module):
        def forward(self, x):
            return conv_bn_act(x, torch.ones(4, 4, 1, 1), training=True)

    return nn.Sequential(rir.ConvBNAct(3, 4, 3), nn.Sequential(Calls(), rir.RiRBlock(4, 4)))


def test_names():
    """Names are those in the given model, else those of the classes, also if fuse_ has swapped the class."""
    model, (fused, _) = net(), resnet_twins()
    with rir.record_calls(model) as named, rir.record_calls() as nameless:
        model(X)
        fused(images())
    ours = ["0", "1.0", "1.1.layers.0", "1.1.layers.1"]
    kinds = ["ResNet", "BasicBlock", "BasicBlock", "BasicBlock", "Sequential", "BasicBlock"]
    assert [call.name for call in named] == ours + kinds
    assert [call.name for call in nameless] == ["ConvBNAct", "Calls", "RiRLayer", "RiRLayer", *kinds]
    assert {call.fused for call in named} == {True}
    assert [call.shape for call in named[:2]] == [(2, 3, 5, 5), (2, 4, 5, 5)]


def test_synchronized_norms_that_are_called():
    """In one process they run nn.BatchNorm2d, which is none of our operations."""
    model = rir.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    with rir.record_calls() as calls:
        model(X)
    assert not calls


def test_each_context_has_its_own_list():
    with rir.record_calls() as outer:
        call()
        with rir.record_calls() as inner:
            call("torch")
        call("reference")
    call()
    assert [one.impl for one in outer] == ["torch", "torch", "reference"] and [one.impl for one in inner] == ["torch"]
    assert recording.recorders == () and not recording.on()


def test_contexts_may_end_in_any_order():
    first, second = rir.record_calls(), rir.record_calls()
    lists = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    call()
    second.__exit__(None, None, None)
    assert [len(calls) for calls in lists] == [0, 1]


def test_an_exception_ends_it():
    """A refused call has not run; calls that ran before stay listed."""
    with pytest.raises(ValueError), rir.record_calls() as outer, rir.record_calls() as inner:
        call()
        call(x=X[:, :2])
    assert len(outer) == len(inner) == 1 and not recording.on()


def test_threads():
    """The calls of all threads are listed, also if several threads record."""
    lists, start = [], threading.Barrier(4)

    def work():
        with rir.record_calls() as calls:
            start.wait(10)
            for _ in range(20):
                call()
            start.wait(10)
        lists.append(calls)

    with rir.record_calls() as calls:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(one) for one in (calls, *lists)] == [80] * 5 and recording.recorders == ()


def test_one_that_fails_is_the_last(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    with pytest.raises(MemoryError), rir.record_calls() as calls:
        call()
        monkeypatch.setattr(aten, "conv_bn_act", fail)
        call(x=X[:1])
        call()
    assert [call.shape[0] for call in calls] == [2, 1]


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_kernels(impl):
    """A call and the one that repeats its plan are listed alike; a residual before the norm is no second operation;
    an empty batch runs by torch."""
    with rir.record_calls() as calls:
        for _ in range(2):
            call(impl)
        norm_act(X4, residual=X4, residual_at="pre_norm", training=True, impl=impl)
        with rir.use_impl(impl):
            call()
        conv_bn_act(X[:0], WEIGHT, running_mean=torch.zeros(4), running_var=torch.ones(4), impl=impl)
    chosen = "" if impl == "triton" else 'use_impl("hybrid")'
    assert seen(calls) == [
        *[("conv_bn_act", (2, 3, 5, 5), impl, True, "")] * 2,
        ("norm_act", (2, 4, 5, 5), "triton", True, ""),
        ("conv_bn_act", (2, 3, 5, 5), impl, True, chosen),
        ("conv_bn_act", (0, 3, 5, 5), "torch", True, "there is no image in the batch"),
    ]


class OnGPU:
    """What the choice of an implementation reads of x."""

    def __init__(self, dtype=torch.bfloat16):
        self.device, self.dtype, self.shape = torch.device("cuda:0"), dtype, (8, 3, 32, 32)


REASONS = {
    "": (OnGPU(), WEIGHT, {}),
    "the kernels take float16, bfloat16 and float32": (OnGPU(torch.float64), WEIGHT, {}),
    "fp32 without TF32 does not use the tensor cores": (OnGPU(torch.float32), WEIGHT, {}),
    "there is no kernel for stride=(3, 3) (1 and 2 are supported)": (OnGPU(), WEIGHT, {"stride": (3, 3)}),
}


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(choose, "_missing_on", lambda index: "")
    monkeypatch.setattr(choose, "measured_choice", lambda *_: None)
    monkeypatch.setattr(devices, "_name_at", lambda index: "a GPU")


@pytest.mark.parametrize("reason", REASONS)
def test_why_not_triton(reason, a_gpu, monkeypatch):
    monkeypatch.setattr(switches, "tf32_allowed", lambda: False)
    x, weight, options = REASONS[reason]
    arguments = x, weight, ConvBNActSpec(**options), True
    assert choose.why_not_triton(*arguments) == reason
    assert (choose.resolve("auto", *arguments) == "triton") == (reason == "")
    assert not choose.why_not_triton(OnGPU(), None, ConvBNActSpec(), True)


def test_measured_and_missing(a_gpu, monkeypatch):
    monkeypatch.setattr(choose, "measured_choice", lambda *_: "hybrid")
    arguments = OnGPU(), WEIGHT, ConvBNActSpec(), True
    assert choose.why_not_triton(*arguments) == "measured to be faster here"
    missing = "needs triton >= 3.6, found 3.0"
    monkeypatch.setattr(choose, "_missing_on", lambda index: missing)
    monkeypatch.setattr(warn, "_warned", {f"rir_kernels falls back to plain PyTorch: {missing}"})
    assert choose.why_not_triton(*arguments) == missing


def test_transforms():
    with rir.record_calls() as calls:
        torch.func.jvp(lambda x: call(x=x), (X,), (X,))
    assert [(one.impl, one.shape) for one in calls] == [("torch", (2, 3, 5, 5))]


def test_printed():
    with rir.record_calls(model := net()) as calls:
        model(X)
    lines = str(calls).splitlines()
    assert lines[0] == "4 of 4 calls ran fused" and lines[2].split() == ["name", "shape", "impl", "fused", "reason"]
    assert lines[4].split() == ["1.0", "2x4x5x5", "torch", "yes", *CPU.split()]
    assert calls._repr_html_().count("<tr>") == 5
    assert str(recording.Calls()) == "0 of 0 calls ran fused"


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module or None, got str"), rir.record_calls("resnet"):
        pass
    assert not recording.on()


def test_checkpointing_lists_a_forward_again():
    fused, _ = resnet_twins()
    with rir.record_calls(fused) as calls:
        y = checkpoint(fused.layer1, torch.randn(2, 8, 4, 4, dtype=torch.float64).requires_grad_(), use_reentrant=True)
        forward = len(calls)
        y.sum().backward()
    assert forward == 2 and [call.name for call in calls] == ["layer1.0"] * 4
