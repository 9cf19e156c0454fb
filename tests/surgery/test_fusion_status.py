"""fusion_status says what a call then does: each change after fuse_ with its reason, and so does record_calls.

And the warning: once for each class and reason, and none for what the model's owner knows of.
"""

import contextlib
import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.common import warn
from rir_kernels.surgery import fallback
from tests.pytorch.networks import BasicBlock, images, resnet_twins
from tests.support.surgery_helpers import Doubled, X, randn, settle
from tests.surgery.test_fallback import added, of, plain
from tests.surgery.test_patched_classes import doubled, patched

ALL = [
    ("", "conv_bn_act"),
    ("layer1.0", "conv_bn_act"),
    ("layer1.0", "conv_bn_add_act"),
    ("layer2.0", "conv_bn_act"),
    ("layer2.0", "conv_bn_add_act"),
]
ALL.append(("layer2.0.downsample", "conv_bn"))


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(fallback, "_told", set())
    monkeypatch.setattr(warn, "_warned", set())


def warned(run):
    """The texts of our warnings, of two runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)  # torch's
        for _ in range(2):
            run()
    return [str(one.message) for one in caught if one.category is RuntimeWarning]


def hook(module):
    module.register_forward_hook(lambda *_: None)


def first(change):
    """The change of the first block."""
    return lambda model: change(model.layer1[0])


def dilate(block, name="conv1"):
    conv = getattr(block, name)
    conv.dilation = conv.padding = (2, 2)


HOOK, DILATION = "a hook is registered on it", "dilation=(2, 2): only undilated convolutions are fused"
PATCHED = "Conv2d.forward has been replaced on the class"
BLOCKS = range(1, 5)
# what is changed, {which of ALL fall back: why}, the classes that are warned of
CHANGES = {
    "nothing": (lambda model: None, {}, []),
    "hook on a norm": (first(lambda b: hook(b.bn1)), {1: f"its norm: {HOOK}"}, []),
    "hook on a unit": (first(hook), {}, []),
    "parametrization": (
        first(lambda b: parametrize.register_parametrization(b.conv2, "weight", Doubled())),
        {2: "its convolution: it is parametrized"}, [],
    ),
    "norm in evaluation": (first(lambda b: b.bn1.eval()), {}, []),
    "our synchronized norms": (rir.convert_sync_batchnorm, {}, []),
    "torch's synchronized norm": (
        first(lambda b: setattr(b, "bn2", nn.SyncBatchNorm.convert_sync_batchnorm(b.bn2))),
        {2: "its norm: SyncBatchNorm is not a BatchNorm2d"}, ["BasicBlock"],
    ),
    "another norm": (
        lambda model: setattr(model, "bn1", nn.GroupNorm(2, 8).double()),
        {0: "its norm: GroupNorm is not a BatchNorm2d"}, ["ResNet"],
    ),
    "another activation": (
        first(lambda b: setattr(b, "relu", nn.GELU())),
        {1: "its activation: GELU is not a ReLU", 2: "its activation: GELU is not a ReLU"}, ["BasicBlock"],
    ),
    "dilation": (first(dilate), {1: f"its convolution: {DILATION}"},
        ["BasicBlock"]),
    "eps": (first(lambda b: setattr(b.bn2, "eps", torch.tensor(0.1))), {2: "its norm: its eps is a Tensor"},
        ["BasicBlock"]),
    "attribute": (
        first(lambda b: setattr(b, "downsample", nn.Identity())),
        dict.fromkeys((1, 2), "downsample has changed"), ["BasicBlock"],
    ),
    "method of the instance": (
        first(lambda b: setattr(b.conv1, "forward", b.conv1.forward)),
        {1: "its convolution: its forward was replaced on the instance"}, ["BasicBlock"],
    ),
}  # fmt: skip


def assert_says(model, reasons, classes):
    """The status, what runs, and the warnings."""
    status = rir.fusion_status(model)
    expected = [(*ALL[i], i not in reasons, reasons.get(i, "")) for i in range(len(ALL))]
    assert [(one.name, one.pattern, one.fused, one.reason) for one in status] == expected
    model.eval()  # where torch's own synchronized norm runs on a CPU
    with rir.record_calls(model) as calls:
        texts = warned(lambda: model(images()))
    found = {(call.name, call.fused, "" if call.fused else call.reason) for call in calls}
    assert found == {(one.name, one.fused, one.reason) for one in status}
    assert [text.split(" no longer")[0] for text in texts] == [f"what rir.fuse_ has fused in {c}" for c in classes]
    assert all(reason in " ".join(texts) for reason in reasons.values()) or not classes


@pytest.mark.parametrize("name", CHANGES)
def test_status_is_what_a_call_does(name):
    fused, _ = resnet_twins()
    change, reasons, classes = CHANGES[name]
    change(fused)
    assert_says(fused, reasons, classes)


PATCHES = {
    "of torch": (nn.Conv2d, "forward", dict.fromkeys(range(6), f"its convolution: {PATCHED}"),
        ["ResNet", "BasicBlock", "Sequential"]),
    "of a block": (BasicBlock, "forward", dict.fromkeys(BLOCKS, "BasicBlock.forward has been replaced on the class"),
        ["BasicBlock"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHES)
def test_classes_that_are_patched(name):
    fused, _ = resnet_twins()
    kind, method, reasons, classes = PATCHES[name]
    with patched(kind, method, doubled(getattr(kind, method))):
        assert_says(fused, reasons, classes)
    assert all(one.fused for one in rir.fusion_status(fused))


def test_a_hook_on_all_modules():
    fused, _ = resnet_twins()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert_says(fused, dict.fromkeys(range(6), "a hook is registered for all modules"), [])
    finally:
        handle.remove()


SWITCH = 1.0


def scaled(m, x):
    return plain(m, x * SWITCH)


def test_what_is_outside_of_the_module(monkeypatch):
    """A global and a variable of a closure, by their names."""
    factor = 1.0

    def enclosed(m, x):
        return plain(m, x * factor)

    models = of(scaled), of(enclosed)
    for model in models:
        rir.fuse_(model)
    monkeypatch.setitem(globals(), "SWITCH", 2.0)
    factor = 2.0
    for model, name in zip(models, ("SWITCH", "factor"), strict=True):
        (one,) = rir.fusion_status(model)
        assert (one.fused, one.reason) == (False, f"{name} has changed")
        assert len(warned(lambda model=model: model(X.float()))) == 1


def test_a_class_on_top_and_another_forward():
    """A class that inherits our forward runs it; one that has its own, or an instance that has, may not."""
    fused, _ = resnet_twins()
    block, ours = fused.layer1[0], type(fused.layer1[0])
    plainly = type("Plainly", (ours,), {})
    block.__class__ = plainly
    assert_says(fused, {}, [])
    block.__class__ = type("Above", (plainly,), {"forward": lambda self, x: x})
    above = "Above has another forward, which was put on top"
    assert [one.reason for one in rir.fusion_status(fused)] == ["", above, above, "", "", ""]
    block.__class__ = ours

    @functools.wraps(block.forward)
    def wrapper(x):
        return ours.forward(block, x)

    block.forward = wrapper  # which says what it wraps
    assert_says(fused, {}, [])
    block.forward = lambda x: x
    replaced = "its forward was replaced on the instance"
    assert [one.reason for one in rir.fusion_status(fused)] == ["", replaced, replaced, "", "", ""]
    with rir.record_calls(fused) as calls:
        fused(images())
    assert "layer1.0" not in [call.name for call in calls] and len(calls) == 4
    del block.forward
    ours.forward, forward = (lambda self, x: x), ours.forward
    try:
        assert not rir.fusion_status(fused)[1].fused
    finally:
        ours.forward = forward


CALLS = {
    "broadcast": ((X, X[:1]), "what is added has another shape"),
    "another dtype": ((X, X.float()), "what is added has another dtype"),
    "no image": ((X, X[0]), "it was not given images, dense tensors of four dimensions"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_cannot_be_one_operation(name):
    """The status is that of the model, which fits; the call's reason is in the record, and is no news to its owner."""
    model = settle(of(added))
    rir.fuse_(model)
    inputs, reason = CALLS[name]
    with rir.record_calls(model) as calls:
        assert not warned(lambda: model(*inputs))
    assert [(call.name, call.shape, call.impl, call.fused, call.reason) for call in calls] == [
        ("", tuple(X.shape), "", False, reason)
    ] * 2
    assert [one.fused for one in rir.fusion_status(model)] == [True]


def test_tensors_that_are_refused():
    model = settle(of(plain))
    rir.fuse_(model)
    model.conv.half()
    with rir.record_calls() as calls, pytest.raises(RuntimeError):
        model(X)
    assert [(call.name, call.fused) for call in calls] == [("plain", False)] and "dtype" in calls[0].reason


def test_other_arguments():
    def optional(m, x, scale=1.0):
        return plain(m, x * scale)

    model = settle(type("Optional", (type(of(plain)),), {"forward": optional})(None))
    rir.fuse_(model)
    with rir.record_calls() as calls:
        assert not warned(lambda: model(X, 2.0))
    assert {call.reason for call in calls} == {"it was called with other arguments than its forward was traced with"}


def layer(**options):
    return settle(reference.RiRLayer(4, 4, **options)).eval()


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
    "unit": (lambda: settle(reference.ConvBNAct(4, 4, 3)), "conv_bn_act", lambda m: None, "", 0),
    "unit, no ReLU": (
        lambda: settle(reference.ConvBNAct(4, 4, 3, activation=None)), "conv_bn", lambda m: hook(m.bn), HOOK, 0,
    ),
    "unit, padding": (
        lambda: settle(reference.ConvBNAct(4, 4, 3)), "conv_bn_act", lambda m: setattr(m.conv, "padding", "same"),
        "padding='same': expected numbers", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_units_that_are_known_as_a_whole(name):
    make, pattern, change, reason, texts = UNITS[name]
    model = make()
    rir.fuse_(model)
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
    model = settle(rir_cifar.RiRUnit(2, 2, stride=1)).eval()
    rir.fuse_(model)
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


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.closed = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), False

    def forward(self, x):
        return self.bn(self.conv(x)) + x if x is not None else x


def gate(module, x, *, impl):
    return rir.surgery.conv_bn_act(x, module.conv, module.bn, None, x, impl=impl)


@pytest.fixture
def gates():
    register = rir.register_pattern(
        Gate, pattern="conv_bn_add_act", parts={"conv": nn.Conv2d, "bn": nn.BatchNorm2d},
        obstacle=lambda module: "it is closed" if module.closed else "",
    )  # fmt: skip
    register(gate)
    yield settle(Gate())
    rir.unregister_pattern(Gate)


def test_forwards_that_are_registered(gates):
    rir.fuse_(gates)
    with rir.record_calls(gates) as calls:
        gates(X)
        gates.closed = True  # by its own obstacle, which is no news
        assert not warned(lambda: gates(X))
        assert [(one.pattern, one.reason) for one in rir.fusion_status(gates)] == [("conv_bn_add_act", "it is closed")]
        gates.conv.groups = 2
        with contextlib.suppress(RuntimeError):  # the weight is not that of groups
            assert not gates(X)
        assert len(warn._warned) == 1
    assert [call.fused for call in calls[:2]] == [True, False]
    assert rir.fusion_status(gates)[0].reason == "conv: groups > 1: only ungrouped convolutions are fused"
    assert rir.fused_source(gates) == inspect.getsource(gate)


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


def test_what_is_printed():
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


@pytest.mark.parametrize("ask", [rir.fusion_status, rir.fused_source])
def test_what_is_no_module(ask):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        ask(3)


def test_the_source_of_what_is_not_fused():
    with pytest.raises(ValueError, match=r"got a ReLU that runs its own forward: call rir.fuse_\(model\) first"):
        rir.fused_source(nn.ReLU())


def test_no_forward_runs_and_nothing_changes():
    fused, _ = resnet_twins()
    before = copy.deepcopy(fused.state_dict())
    dicts = [list(vars(module)) for module in fused.modules()]
    fused.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with rir.record_calls() as calls:
        rir.fusion_status(fused)
    assert not calls and all(torch.equal(t, before[name]) for name, t in fused.state_dict().items())
    assert [list(vars(module)) for module in fused.modules()] == dicts


def test_the_compiler_is_not_disturbed():
    """One graph, without a warning; what it runs is listed in eager mode only."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    fused = settle(nn.Sequential(of(plain), of(plain))).eval()
    rir.fuse_(fused)
    dilate(fused[0], "conv")
    counter = CompileCounter()
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert not warned(lambda: compiled(X))
        with rir.record_calls() as calls:
            y = compiled(X)
        assert torch.equal(y, compiled(X)) and counter.frame_count == 1 and not calls
        torch._dynamo.reset()
        with rir.record_calls() as calls:
            compiled(X)
        assert torch.equal(y, compiled(X)) and counter.frame_count == 2 and not calls
        assert len(warned(lambda: fused(X))) == 1
    torch._dynamo.reset()


def test_a_call_that_is_refused_compiles():
    torch._dynamo.reset()
    model = settle(of(plain))
    rir.fuse_(model)
    model.bn.momentum = True  # a number to torch, but not to us
    with rir.record_calls() as calls:
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))
    assert [call.fused for call in calls] == [False] and "momentum must be a number, got True" in calls[0].reason
    torch._dynamo.reset()


def test_checkpointing_lists_a_forward_again():
    fused, _ = resnet_twins()
    with rir.record_calls(fused) as calls:
        y = checkpoint(fused.layer1, randn(2, 8, 4, 4).requires_grad_(), use_reentrant=True)
        forward = len(calls)
        y.sum().backward()
    assert forward == 2 and [call.name for call in calls] == ["layer1.0"] * 4
