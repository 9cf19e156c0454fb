"""Units with parts in lists and dicts of modules are fused; graphs of torch.fx and torch.export say why not."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from rir_kernels.surgery import fold_bn_, fuse_
from tests.support.surgery_helpers import X, assert_same, assert_same_after, pair_of, settle, units_skipped


def convs(count=3):
    return [nn.Conv2d(4, 4, 3, padding=1) for _ in range(count)]


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs, self.bns = nn.ModuleList(convs()), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.heads = nn.ModuleDict({"conv": convs(1)[0], "class": nn.BatchNorm2d(4)})
        self.nested = nn.ModuleList(nn.ModuleList([conv, nn.BatchNorm2d(4)]) for conv in convs(2))
        self.wrapped = nn.ModuleList(nn.Sequential(conv) for conv in convs(2))


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


def of_lists(m, x):
    for conv, bn in m.nested:
        x = F.relu(bn(conv(x)))
    return x


def across_a_sequential(m, x):
    for conv, bn in zip(m.wrapped, m.bns, strict=False):
        x = F.relu(bn(conv(x)))
    return x


CASES = {
    "pairwise": (pairwise, 3),
    "by_index": (by_index, 3),
    "of_a_slice": (of_a_slice, 2),
    "by_key": (lambda m, x: F.relu(m.heads["class"](m.heads["conv"](x))), 1),
    "of_lists": (of_lists, 2),
    "across_a_sequential": (across_a_sequential, 2),
}
KINDS = {name: type(f"Lists_{name}", (Lists,), {"forward": forward}) for name, (forward, _) in CASES.items()}
globals().update({kind.__name__: kind for kind in KINDS.values()})  # where pickle looks for a class


@pytest.mark.parametrize("name", CASES)
def test_fused(name):
    original, operations = settle(KINDS[name]()), CASES[name][1]
    fused = copy.deepcopy(original)
    report = fuse_(fused)
    assert len(report.replaced) == report.coverage.fused == operations, report
    # the modules that this forward does not use
    left = sum(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in original.modules()) - 2 * operations
    assert [item.reason.partition(" ")[0] for item in report.skipped] == ["no"] * left, report
    assert_same(pickle.loads(pickle.dumps(fused)), original, X, calls=operations)


def test_changes_of_a_list_are_noticed():
    fused, original = pair_of(settle(KINDS["pairwise"]()), 3)

    def change(model):
        model.bns[1] = nn.LeakyReLU()  # another class: the modules of that unit run one by one
        model.convs.append(nn.Conv2d(4, 4, 1))  # another length: the original forward runs
        if model is fused:
            assert "convs" in model._rir_fusion.program.obstacle(model)
        model.bns.append(nn.BatchNorm2d(4))

    assert_same_after(change, fused, original, X, calls=0)


def test_a_list_is_folded():
    original = settle(KINDS["pairwise"]()).eval()
    for unused in ("heads", "nested", "wrapped"):  # an unused norm might take the place of one that forward calls
        delattr(original, unused)
    folded = fold_bn_(copy.deepcopy(original))
    assert not any(isinstance(bn, nn.BatchNorm2d) for bn in folded.bns)
    torch.testing.assert_close(folded(X), original(X), rtol=1e-10, atol=1e-10)


class Extractor(fx.GraphModule):
    """A subclass, as feature extractors have one for their graphs."""


def of_operators(model):
    """A graph as torch.export makes it: functions replace the children."""
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
