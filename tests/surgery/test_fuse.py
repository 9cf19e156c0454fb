"""fuse_ and unfuse_ in general: what they find, report and change."""

import json

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import rir_kernels.surgery.fuse
from rir_kernels import reference
from rir_kernels.surgery import FusionReport, fuse_, unfuse_
from rir_kernels.surgery.class_swap import Fused
from rir_kernels.surgery.patterns import Family, Match, Refusal, families
from rir_kernels.surgery.patterns.base import exactly
from tests.support.surgery_helpers import (
    OPERATIONS,
    Net,
    X,
    assert_same,
    fused_calls,
    net,
    pair_of,
    settle,
    unchanged,
    units_skipped,
)


def test_dry_run_reports_and_changes_nothing():
    model = net()
    with unchanged(model):
        planned = fuse_(model, dry_run=True, filter_fn=lambda _module, name: name != "stem")
    done = fuse_(model, filter_fn=lambda _module, name: name != "stem")
    assert (planned.replaced, planned.skipped) == (done.replaced, done.skipped)
    assert "would fuse 2" in str(planned) and "fused 2" in str(done)


def test_fusing_twice():
    model = net()
    fuse_(model)
    classes = [type(m) for m in model.modules()]
    report = fuse_(model, impl="reference")
    assert not report.replaced and len(report.skipped) == OPERATIONS
    assert all("already fused with impl='auto'" in item.reason for item in report.skipped)
    assert [type(m) for m in model.modules()] == classes
    unfuse_(model)
    assert {item.impl for item in fuse_(model, impl="reference").replaced} == {"reference"}


def test_filter_fn_sees_module_and_name_of_what_could_be_fused():
    model, seen = net(), []

    def filter_fn(module, name):
        assert module is model.get_submodule(name) and not isinstance(module, nn.Conv2d)
        seen.append(name)
        return name == "layers.1"

    report = fuse_(model, filter_fn=filter_fn)
    assert seen == ["stem", "layers.0", "layers.1"]
    assert [item.name for item in report.replaced] == ["layers.1"]
    assert [(item.name, item.reason) for item in units_skipped(report)] == [
        ("stem", "excluded by filter_fn"),
        ("layers.0", "excluded by filter_fn"),
    ]


def test_a_filter_fn_that_raises_changes_nothing():
    model = net()

    def filter_fn(_module, name):
        if name == "layers.1":
            raise KeyError(name)
        return True

    with unchanged(model), pytest.raises(KeyError):
        fuse_(model, filter_fn=filter_fn)


def test_patterns():
    for patterns in (("conv_add_bn_act", "conv_bn_scaled_add_act"), ["P6", "P4"], "P4"):
        report = fuse_(net(), patterns=patterns)
        assert [(item.pattern, item.code) for item in report.replaced] == [("conv_add_bn_act", "P4")] * 2
    report = fuse_(net(), patterns=[])
    assert not report.replaced and len(units_skipped(report)) == OPERATIONS
    assert "conv_bn_act is not among the patterns" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"patterns": ["conv_bn_act", "P7"]}, ValueError, r"conv_bn_act, conv_bn, .* got 'P7'"),
        ({"patterns": [4]}, ValueError, "got 4"),
        ({"impl": "cuda"}, ValueError, "impl must be one of .* got 'cuda'"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    model = net()
    with unchanged(model), pytest.raises(error, match=text):
        fuse_(model, **arguments)


def test_no_module():
    for function in (fuse_, unfuse_):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
            function([])


def test_the_model_itself_and_shared_modules():
    report = fuse_(settle(reference.RiRLayer(4, 4)))
    assert [item.name for item in report.replaced] == [""] and "(the model itself)" in str(report)

    layer = settle(reference.RiRLayer(4, 4))
    fused, original = pair_of(nn.Sequential(layer, layer), 1)
    (item,) = fuse_(original, dry_run=True).replaced
    assert (item.name, item.also) == ("0", ("1",))
    assert_same(fused, original, X, calls=2)
    for excluded in ("0", "1"):  # one excluded name is enough
        pair_of(original, 0, filter_fn=lambda _module, name, excluded=excluded: name != excluded)


def test_bypassed_modules_are_not_candidates(monkeypatch):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.other = Net().stem, Net().stem

    def find(module):
        return [Refusal("odd", ("inside",)) if module.training else Match("conv_bn_scaled_add_act", ("inside",))]

    family = Family(**exactly(lambda: Outer), find=find, mixin=type("FusedOuter", (Fused,), {}))
    monkeypatch.setattr(rir_kernels.surgery.fuse, "families", lambda: [family, *families()])
    assert [item.name for item in fuse_(Outer().eval(), dry_run=True).replaced] == ["", "other"]
    assert [item.name for item in fuse_(Outer().train(), dry_run=True).replaced] == ["inside", "other"]
    fuse_(model := Outer().eval())
    assert not fuse_(model).replaced


def test_report_reads_well():
    model = nn.Sequential(*(reference.RiRLayer(4, 4) for _ in range(7)), net())
    model.add_module("<b>", reference.RiRLayer(4, 4))
    model[2].bn_t.eval()
    model[3].bn_r.register_forward_hook(lambda *_: None)
    report = fuse_(model, filter_fn=lambda _module, name: name != "<b>")
    assert isinstance(report, FusionReport)
    text = str(report)
    assert text == repr(report) and len(text.splitlines()) < 12
    assert "Sequential: fused 8 operations: 29 of 41 convolutions (70 %); skipped 21" in text
    assert "7 x conv_add_bn_act in RiRLayer, impl=auto: 0, 1, 4, 5 and 3 more" in text
    assert "1 x RiRLayer, bn_r: a hook is registered on it: 3, with 2 BatchNorm2d, 4 Conv2d" in text
    assert "1 x RiRLayer, the norms differ in mode" in text
    page = report._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "<table" in page
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["model"] == "Sequential" and plain["dry_run"] is False
    assert plain["skipped"][0]["name"] == "2" and plain["replaced"][0]["pattern"] == "conv_add_bn_act"
    assert str(fuse_(nn.Linear(1, 1))) == "Linear: fused 0 operations, skipped 0"


def test_unfuse_refuses_under_another_swap():
    model = net()
    fuse_(model)
    unit = model.layers[1]
    fused_class, unit.__class__ = type(unit), type("Wrapped", (type(unit),), {})
    before = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"layers\.1 was fused, and is now a Wrapped"):
        unfuse_(model)
    assert [type(m) for m in model.modules()] == before
    assert "already fused" in fuse_(model).skipped[-1].reason
    unit.__class__ = fused_class
    assert type(unfuse_(model).layers[1]) is reference.RiRLayer


def test_meta_device():
    with torch.device("meta"):
        model = Net()
    assert len(fuse_(model).replaced) == OPERATIONS
    assert model(torch.empty(2, 4, 6, 6, device="meta")).shape == (2, 3)
    model.to_empty(device="cpu").double().load_state_dict((original := net()).state_dict())
    assert_same(model, original, X, calls=OPERATIONS)


def test_tensor_subclasses_are_not_fused():
    """DTensor and quantized weights, for example, define every operation themselves."""
    model = net()
    model.stem[0].weight = nn.Parameter(TwoTensor(model.stem[0].weight.detach(), model.stem[0].weight.detach()))
    assert "a parameter of it is a TwoTensor" in fuse_(model).skipped[0].reason

    fused, original = pair_of(net())
    with fused_calls(0):
        found = fused.stem(TwoTensor(X, X))
    assert torch.equal(found.a, original.stem(X))
