"""fusion_status predicts what a call does: its reasons are those that record_calls lists for the call.

A warning comes once for each class and reason, and not for changes that the model's owner makes knowingly.
"""

import copy
import functools
import pickle
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.common import warn
from rir_kernels.surgery import fallback
from tests.pytorch.networks import BasicBlock, images, resnet_twins
from tests.support.surgery_helpers import Doubled, X, randn, settle, unchanged
from tests.support.surgery_models import with_forward
from tests.surgery.test_fallback import added, plain
from tests.surgery.test_patched_classes import doubled

ALL = [
    ("", "conv_bn_act"), ("layer1.0", "conv_bn_act"), ("layer1.0", "conv_bn_add_act"), ("layer2.0", "conv_bn_act"),
    ("layer2.0", "conv_bn_add_act"), ("layer2.0.downsample", "conv_bn"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(fallback, "_told", set())
    monkeypatch.setattr(warn, "_warned", set())


def warned(run):
    """The texts of our warnings in two runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)  # torch's
        for _ in range(2):
            run()
    return [str(one.message) for one in caught if one.category is RuntimeWarning]


def hook(module):
    module.register_forward_hook(lambda *_: None)


def fused(model):
    rir.fuse_(settle(model))
    return model


def first(change):
    """Applies the change to the first block."""
    return lambda model: change(model.layer1[0])


def dilate(block, name="conv1"):
    conv = getattr(block, name)
    conv.dilation = conv.padding = (2, 2)


HOOK, DILATION = "a hook is registered on it", "dilation=(2, 2): only undilated convolutions are fused"
PATCHED = "Conv2d.forward has been replaced on the class"

BLOCK = ["BasicBlock"]
# (change, indices in ALL of the operations that fall back, why, classes that the warnings name)
CHANGES = {
    "nothing": (lambda model: None, (), "", []),
    "hook on a norm": (first(lambda b: hook(b.bn1)), (1,), f"its norm: {HOOK}", []),
    "hook on a unit": (first(hook), (), "", []),
    "parametrization": (
        first(lambda b: parametrize.register_parametrization(b.conv2, "weight", Doubled())),
        (2,), "its convolution: it is parametrized", [],
    ),
    "norm in evaluation": (first(lambda b: b.bn1.eval()), (), "", []),
    "our synchronized norms": (rir.convert_sync_batchnorm, (), "", []),
    "torch's synchronized norm": (
        first(lambda b: setattr(b, "bn2", nn.SyncBatchNorm.convert_sync_batchnorm(b.bn2))),
        (2,), "its norm: SyncBatchNorm is not a BatchNorm2d", BLOCK,
    ),
    "another norm": (
        lambda model: setattr(model, "bn1", nn.GroupNorm(2, 8).double()),
        (0,), "its norm: GroupNorm is not a BatchNorm2d", ["ResNet"],
    ),
    "another activation": (
        first(lambda b: setattr(b, "relu", nn.GELU())), (1, 2), "its activation: GELU is not a ReLU", BLOCK,
    ),
    "dilation": (first(dilate), (1,), f"its convolution: {DILATION}", BLOCK),
    "eps": (first(lambda b: setattr(b.bn2, "eps", torch.tensor(0.1))), (2,), "its norm: its eps is a Tensor", BLOCK),
    "attribute": (
        first(lambda b: setattr(b, "downsample", nn.Identity())), (1, 2), "downsample has changed", BLOCK,
    ),
    "method of the instance": (
        first(lambda b: setattr(b.conv1, "forward", b.conv1.forward)),
        (1,), "its convolution: its forward was replaced on the instance", BLOCK,
    ),
}  # fmt: skip


def assert_says(model, fallbacks=(), reason="", classes=()):
    """The status, the recorded calls and the warnings agree: these operations fall back for this reason."""
    status = rir.fusion_status(model)
    expected = [(*ALL[i], i not in fallbacks, reason if i in fallbacks else "") for i in range(len(ALL))]
    assert [(one.name, one.pattern, one.fused, one.reason) for one in status] == expected
    model.eval()  # the mode in which torch's synchronized norm runs on a CPU
    with rir.record_calls(model) as calls:
        texts = warned(lambda: model(images()))
    found = {(call.name, call.fused, "" if call.fused else call.reason) for call in calls}
    assert found == {(one.name, one.fused, one.reason) for one in status}
    assert [text.split(" no longer")[0] for text in texts] == [f"what rir.fuse_ has fused in {c}" for c in classes]
    assert reason in " ".join(texts) or not classes


@pytest.mark.parametrize("name", CHANGES)
def test_status_is_what_a_call_does(name):
    fused, _ = resnet_twins()
    change, *says = CHANGES[name]
    change(fused)
    assert_says(fused, *says)


PATCHES = {
    nn.Conv2d: (range(6), f"its convolution: {PATCHED}", ["ResNet", "BasicBlock", "Sequential"]),
    BasicBlock: (range(1, 5), "BasicBlock.forward has been replaced on the class", BLOCK),
}


@pytest.mark.parametrize("kind", PATCHES)
def test_classes_that_are_patched(kind):
    fused, _ = resnet_twins()
    with mock.patch.object(kind, "forward", doubled(kind.forward)):
        assert_says(fused, *PATCHES[kind])
    assert all(one.fused for one in rir.fusion_status(fused))


def test_a_hook_on_all_modules(request):
    fused, _ = resnet_twins()
    request.addfinalizer(nn.modules.module.register_module_forward_hook(lambda *_: None).remove)
    assert_says(fused, range(6), "a hook is registered for all modules")


SWITCH = 1.0


def test_globals_and_closures_by_name(monkeypatch):
    factor = 1.0
    models = {
        "SWITCH": with_forward(lambda m, x: m.block(x * SWITCH))(),
        "factor": with_forward(lambda m, x: m.block(x * factor))(),
    }
    for model in models.values():
        rir.fuse_(model)
    monkeypatch.setitem(globals(), "SWITCH", 2.0)
    factor = 2.0
    for name, model in models.items():
        (one,) = rir.fusion_status(model)
        assert (one.fused, one.reason) == (False, f"{name} has changed")
        assert len(warned(lambda model=model: model(X.float()))) == 1


def test_other_forwards_of_class_and_instance():
    """A subclass that inherits our forward runs it; a subclass or an instance with another forward does not."""
    fused, _ = resnet_twins()
    block, ours = fused.layer1[0], type(fused.layer1[0])
    block.__class__ = plainly = type("Plainly", (ours,), {})
    assert_says(fused)
    block.__class__ = type("Above", (plainly,), {"forward": lambda self, x: x})
    above = "Above has another forward, which was put on top"
    assert [one.reason for one in rir.fusion_status(fused)] == ["", above, above, "", "", ""]
    block.__class__ = ours

    @functools.wraps(block.forward)
    def wrapper(x):
        return ours.forward(block, x)

    block.forward = wrapper  # its __wrapped__ is the original
    assert_says(fused)
    block.forward = lambda x: x
    replaced = "its forward was replaced on the instance"
    assert [one.reason for one in rir.fusion_status(fused)] == ["", replaced, replaced, "", "", ""]
    with rir.record_calls(fused) as calls:
        fused(images())
    assert "layer1.0" not in [call.name for call in calls] and len(calls) == 4
    del block.forward
    with mock.patch.object(ours, "forward", lambda self, x: x):
        assert not rir.fusion_status(fused)[1].fused


CALLS = {
    "broadcast": ((X, X[:1]), "what is added has another shape"),
    "another dtype": ((X, X.float()), "what is added has another dtype"),
    "no image": ((X, X[0]), "it was not given images, dense tensors of four dimensions"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_cannot_be_one_operation(name):
    """The status describes the model, which fits; the record has the call's reason, of which nobody is warned."""
    model = fused(with_forward(added)())
    inputs, reason = CALLS[name]
    with rir.record_calls(model) as calls:
        assert not warned(lambda: model(*inputs))
    assert [(call.name, call.shape, call.impl, call.fused, call.reason) for call in calls] == [
        ("", tuple(X.shape), "", False, reason)
    ] * 2
    assert [one.fused for one in rir.fusion_status(model)] == [True]


def test_tensors_that_are_refused():
    model = fused(with_forward(plain)())
    model.conv.half()
    with rir.record_calls() as calls, pytest.raises(RuntimeError):
        model(X)
    assert [(call.name, call.fused) for call in calls] == [("plain", False)] and "dtype" in calls[0].reason


def layer():
    return reference.RiRLayer(4, 4).eval()


def unit(**options):
    return reference.ConvBNAct(4, 4, 3, **options)


def counts_differ(m):
    for norm in (m.bn_r, m.bn_t):
        norm.train().momentum = None
    m.bn_t.num_batches_tracked.fill_(7)


UNITS = {
    "layer": (layer, "conv_add_bn_act", lambda m: None, "", 0),
    "layer, hook": (layer, "conv_add_bn_act", lambda m: hook(m.conv_rt), f"conv_rt: {HOOK}", 0),
    "layer, one norm in training": (
        layer, "conv_add_bn_act", lambda m: m.bn_t.train(),
        "the norms differ in mode, eps, momentum, tracking, affine parameters, dtype or process group", 0,
    ),
    "layer, norm": (
        layer, "conv_add_bn_act", lambda m: setattr(m, "bn_r", nn.Identity()), "bn_r: Identity is not a BatchNorm2d", 1,
    ),
    "layer, counts": (
        layer, "conv_add_bn_act", counts_differ, "the norms have counted different numbers of batches", 1,
    ),
    "unit": (unit, "conv_bn_act", lambda m: None, "", 0),
    "unit, no ReLU": (lambda: unit(activation=None), "conv_bn", lambda m: hook(m.bn), HOOK, 0),
    "unit, padding": (
        unit, "conv_bn_act", lambda m: setattr(m.conv, "padding", "same"), "padding='same': expected numbers", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_modules_that_are_units(name):
    make, pattern, change, reason, texts = UNITS[name]
    model = fused(make())
    change(model)
    assert [(one.name, one.pattern, one.fused, one.reason) for one in rir.fusion_status(model)] == [
        ("", pattern, not reason, reason)
    ]
    with rir.record_calls(model) as calls:
        assert len(warned(lambda: model(X))) == texts
    assert {(call.name, call.fused) for call in calls} == {("", not reason)}
    assert not reason or {call.reason for call in calls} == {reason}
    source = rir.fused_source(model)
    assert source.startswith("def forward(self, x") and ("bn_state" in source or "packed_convs" in source)


def test_pytorchcvs_unit():
    rir_cifar = pytest.importorskip("pytorchcv.models.rir_cifar")
    model = fused(rir_cifar.RiRUnit(2, 2, stride=1).eval())
    halves = X[:, :2], X[:, 2:]
    assert [(one.pattern, one.fused) for one in rir.fusion_status(model)] == [("conv_add_bn_act", True)]
    with rir.record_calls() as calls:
        model(*halves)
        assert not warned(lambda: model(halves[0], halves[1][:1]))
    assert [call.fused for call in calls] == [True, False, False]
    assert calls[1].reason == "the streams are not two images of its shape"
    hook(model.res_postactiv)
    (one,) = rir.fusion_status(model)
    assert one.reason == f"res_postactiv: {HOOK}"


def test_copies():
    fused, _ = resnet_twins()
    hook(fused.layer1[0].bn1)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(resnet_twins()[0]))):
        status = rir.fusion_status(twin)
        assert [(one.name, one.pattern) for one in status] == ALL
        assert rir.fused_source(twin.layer1[0]) == rir.fused_source(fused.layer1[0])
        with rir.record_calls(twin) as calls:
            twin(images())
        assert {(call.name, call.fused) for call in calls} == {(one.name, one.fused) for one in status}
    assert not rir.fusion_status(copy.deepcopy(fused))[1].fused


def test_printed():
    fused, original = resnet_twins()
    hook(fused.bn1)
    status = rir.fusion_status(fused)
    lines = str(status).splitlines()
    assert lines[0] == "ResNet: 5 of 6 operations run fused" and len(lines) == 9
    assert lines[3].split(maxsplit=5) == ["(the", "model", "itself)", "conv_bn_act", "no", f"its norm: {HOOK}"]
    assert status._repr_html_().count("<tr>") == 7 and repr(status) == str(status)
    assert str(rir.fusion_status(original)) == "ResNet: 0 of 0 operations run fused"


def test_the_source_is_what_runs():
    fused, _ = resnet_twins()
    block, names = fused.eval().layer1[0], {}
    exec(rir.fused_source(block), names)
    x = randn(2, 8, 4, 4)
    assert torch.equal(names["forward"](block, x), block(x))


def test_wrong_arguments():
    for ask in (rir.fusion_status, rir.fused_source):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
            ask(3)
    with pytest.raises(ValueError, match=r"got a ReLU that runs its own forward: call rir.fuse_\(model\) first"):
        rir.fused_source(nn.ReLU())


def test_no_forward_runs_and_nothing_changes():
    fused, _ = resnet_twins()
    fused.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with unchanged(fused), rir.record_calls() as calls:
        rir.fusion_status(fused)
    assert not calls


def test_the_compiler_is_not_disturbed():
    """There is one graph and no warning; only eager calls are listed."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = fused(nn.Sequential(with_forward(plain)(), with_forward(plain)()).eval())
    dilate(model[0], "conv")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert not warned(lambda: compiled(X))
        with rir.record_calls() as calls:
            y = compiled(X)
        assert torch.equal(y, compiled(X)) and counter.frame_count == 1 and not calls
        torch._dynamo.reset()
        with rir.record_calls() as calls:
            compiled(X)
        assert torch.equal(y, compiled(X)) and counter.frame_count == 2 and not calls
        assert len(warned(lambda: model(X))) == 1
    torch._dynamo.reset()


def test_a_call_that_is_refused_compiles():
    torch._dynamo.reset()
    model = fused(with_forward(plain)())
    model.bn.momentum = True  # a number to torch, but not to us
    with rir.record_calls() as calls:
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))
    assert [call.fused for call in calls] == [False] and "momentum must be a number, got True" in calls[0].reason
    torch._dynamo.reset()
