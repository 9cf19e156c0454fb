"""Units whose parts stand in lists and dicts of modules are fused; graphs made by torch.fx or torch.export say why not.

The tolerance is surgery_helpers'.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from rir_kernels.surgery import fold_bn_, fuse_
from tests.support.surgery_helpers import X, assert_same, settle, units_skipped


def convs(count=3):
    return [nn.Conv2d(4, 4, 3, padding=1) for _ in range(count)]


class Lists(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.convs, self.bns = nn.ModuleList(convs()), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.heads = nn.ModuleDict({"conv": convs(1)[0], "class": nn.BatchNorm2d(4)})
        self.nested = nn.ModuleList(nn.ModuleList([conv, nn.BatchNorm2d(4)]) for conv in convs(2))
        self.wrapped = nn.ModuleList(nn.Sequential(conv) for conv in convs(2))

    def forward(self, x):
        return self.function(self, x)


def pairwise(m, x):
    for conv, bn in zip(m.convs, m.bns, strict=True):
        x = F.relu(bn(conv(x)))
    return x


def by_index(m, x):
    for i in range(len(m.convs)):
        x = x + m.bns[-1 - i](m.convs[i](x))
    return x


def of_a_slice(m, x):
    for conv, bn in zip(m.convs[1:], m.bns[1:], strict=True):
        x = F.relu(bn(conv(x)))
    return x


def by_key(m, x):
    return F.relu(m.heads["class"](m.heads["conv"](x)))


def of_lists(m, x):
    for conv, bn in m.nested:
        x = F.relu(bn(conv(x)))
    return x


def across_a_sequential(m, x):
    for conv, bn in zip(m.wrapped, m.bns, strict=False):
        x = F.relu(bn(conv(x)))
    return x


CASES = {pairwise: 3, by_index: 3, of_a_slice: 2, by_key: 1, of_lists: 2, across_a_sequential: 2}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_fused(function):
    original = settle(Lists(function))
    fused = copy.deepcopy(original)
    report = fuse_(fused)
    assert len(report.replaced) == report.coverage.fused == CASES[function], report
    # what this forward does not use
    left = sum(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in original.modules()) - 2 * CASES[function]
    assert [item.reason.partition(" ")[0] for item in report.skipped] == ["no"] * left, report
    assert_same(pickle.loads(pickle.dumps(fused)), original, X, calls=CASES[function])


def test_changes_of_a_list_are_seen():
    original = settle(Lists(pairwise))
    fused = copy.deepcopy(original)
    fuse_(fused)
    torch.manual_seed(1)
    other = [nn.LeakyReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    for model in (original, fused):
        act, conv, bn = copy.deepcopy(other)
        model.bns[1] = act  # of another kind: that unit's modules are called
        model.convs.append(conv.double())  # of another length: the whole forward is the original one
        model.double()
        if model is fused:
            assert "convs" in model._rir_fusion.program.obstacle(model)
        model.bns.append(bn.double())
    assert_same(fused, original, X, calls=0)


def test_a_list_is_folded():
    original = settle(Lists(pairwise)).eval()
    for unused in (
        "heads",
        "nested",
        "wrapped",
    ):  # a norm that forward does not call might take the place of one it does
        delattr(original, unused)
    folded = fold_bn_(copy.deepcopy(original))
    assert not any(isinstance(bn, nn.BatchNorm2d) for bn in folded.bns)
    torch.testing.assert_close(folded(X), original(X), rtol=1e-10, atol=1e-10)


class Extractor(fx.GraphModule):
    """As feature extractors have a class for their graphs."""


def of_operators(model):
    """As torch.export has it: functions in the place of children."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    norm = [graph.get_attr(f"1.{name}") for name in ("weight", "bias", "running_mean", "running_var")]
    graph.output(graph.call_function(torch.ops.aten.batch_norm.default, (x, *norm, False, 0.1, 1e-5, True)))
    return fx.GraphModule(model, graph)


GRAPHS = {
    "symbolic_trace": fx.symbolic_trace,
    "operators": of_operators,
    "subclass": lambda model: Extractor(model, fx.symbolic_trace(model).graph),
}


@pytest.mark.parametrize("made_by", GRAPHS)
def test_graph_modules_say_why(made_by):
    graph = GRAPHS[made_by](nn.Sequential(*convs(1), nn.BatchNorm2d(4), nn.ReLU()).eval())
    fused = nn.Sequential(graph, nn.Sequential(*convs(1), nn.BatchNorm2d(4)))
    report = fuse_(fused)
    assert [item.name for item in report.replaced] == ["1"]
    assert [item.name for item in units_skipped(report)] == ["0"]
    assert all("torch.export" in item.reason for item in report.skipped)


def test_graph_modules_without_a_norm_are_not_named():
    report = fuse_(fx.symbolic_trace(nn.Sequential(*convs(1), nn.ReLU())))
    assert not report.replaced
    assert [(item.name, item.reason.partition(" that")[0]) for item in report.skipped] == [("0", "no norm behind it")]


def test_a_class_that_torch_put_on_top_says_why():
    original = settle(Lists(pairwise))
    original.scale = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(original, "scale", nn.Identity())
    fused = copy.deepcopy(original)
    report = fuse_(fused)
    assert not report.replaced and "ParametrizedLists" in report.skipped[0].reason
    assert type(fused).__name__ == "ParametrizedLists"
