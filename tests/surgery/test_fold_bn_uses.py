"""fold_bn_ does not change a convolution and a norm that the model also uses outside their chain.

Each model would compute something else if they were folded blindly: outputs are compared before and after.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from rir_kernels.surgery.folded_norm import FoldedNorm
from tests.support.surgery_helpers import CLOSE, EXACT, X, settle, unchanged
from tests.support.surgery_models import unit, with_forward


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = unit()

    def forward(self, x):
        return self.stem(x)


class Flat(nn.Module):
    domain = 0

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Lists(nn.Module):
    domain = 0

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])


def conv_by_another_module():
    model = with_forward(lambda m, x: m.stem(x) + m.head(x), Stem)()
    model.head = with_forward(lambda m, x: m.borrowed[0](x), nn.Module)()
    model.head.borrowed = [model.stem[0]]
    return model


def conv_by_weak_reference():
    model = with_forward(lambda m, x: m.stem(x) + m.borrowed()(x), Stem)()
    model.borrowed = weakref.ref(model.stem[0])
    return model


def raw_by_argument(m, x, raw=False):
    y = m.conv(x)
    return y if raw else F.relu(m.norm(y))


def penalty(model):
    return sum(norm.weight.abs().sum() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


class Untraced(Stem):
    """No graph can stand for its forward."""

    def forward(self, x):
        y = self.stem(x)
        return self.more(y, x) if float(y.detach().sum()) > -1e9 else y


class UntracedPath(nn.Module):
    """It calls the convolution of a child, which calls it too."""

    def __init__(self):
        super().__init__()
        self.child = Flat()
        del self.child.other

    def forward(self, x):
        y = self.child(x)
        return y + self.child.conv(x) if float(y.detach().sum()) > -1e9 else y


def tapped(m, x):
    """It takes features out of a network, as perceptual losses do."""
    found = []
    for i, layer in enumerate(m.stem):
        x = layer(x)
        if i in m.taps:
            found.append(x)
    return sum(found) + x


def type_asked(m, x):
    for layer in m.stem:
        x = 2 * layer(x) if isinstance(layer, nn.BatchNorm2d) else layer(x)
    return x


def shared_bias():
    model = nn.Sequential(unit(), unit())
    model[1][0].bias = model[0][0].bias
    return model


def with_hook(make_hook):
    model = Stem()
    model.register_forward_hook(make_hook(model.stem[0]))
    return model


def forward_of_the_instance():
    model = nn.Sequential(unit())
    model[0].forward = lambda x: model[0][0](x)
    return model


# (module, its forward, what the report says among others)
FORWARDS = {
    "ConvAgain": (
        Stem, lambda m, x: m.stem(x) + m.stem[0](x + 1), "stem.0 is also called in the forward of the model itself",
    ),
    "ConvUnderTwoNorms": (
        Flat, lambda m, x: F.relu(m.norm(m.conv(x))) + F.relu(m.other(m.conv(x))), "conv is called more than once",
    ),
    "NormByAttribute": (
        Flat, lambda m, x: F.relu((m.norm if m.domain == 0 else m.other)(m.conv(x))), "may call other in its place",
    ),
    "NormFromList": (Lists, lambda m, x: F.relu(m.norms[m.domain](m.convs[0](x))), ""),
    "ConvByAttribute": (
        Lists, lambda m, x: F.relu(m.norms[0](m.convs[m.domain](x))), "may call convs.1 in its place",
    ),
    "RawByArgument": (Flat, raw_by_argument, "is another one with other arguments"),
    "TypeAsked": (Stem, type_asked, "asks of which class stem.1 is"),
    "TiedDecoder": (
        Stem, lambda m, x: F.conv_transpose2d(m.stem(x), m.stem[0].weight), "'weight' of stem.0 is read",
    ),
    "BiasRead": (Stem, lambda m, x: m.stem(x) + m.stem[0].bias.sum(), "'bias' of stem.0 is read"),
    "GammaRead": (Stem, lambda m, x: m.stem(x) + m.stem[1].weight.abs().sum(), "'weight' of stem.1 is read"),
    "MeanRead": (
        Stem, lambda m, x: m.stem(x - m.stem[1].running_mean.mean()), "'running_mean' of stem.1 is read",
    ),
}  # fmt: skip
# (what an Untraced model adds, what the report says)
UNTRACED = {
    "Untraced": (
        lambda m, y, x: y + m.stem[1].weight.abs().sum(), "the forward of the model itself names 'stem'",
    ),
    "UntracedTraversal": (lambda m, y, x: y + penalty(m), "names 'modules'"),
    "UntracedParameters": (lambda m, y, x: y + sum(p.abs().sum() for p in m.parameters()), "names 'parameters'"),
}  # fmt: skip
# {name: (how the model is made, what the report says)}
USES = {
    **{name: (type(name, (base,), {"forward": forward}), says) for name, (base, forward, says) in FORWARDS.items()},
    **{name: (type(name, (Untraced,), {"more": more}), says) for name, (more, says) in UNTRACED.items()},
    "ConvByAnotherModule": (conv_by_another_module, "the forward of head holds it"),
    "ConvByWeakReference": (conv_by_weak_reference, "the model itself holds it"),
    "UntracedPath": (UntracedPath, "names 'conv'"),
    "Taps": (with_forward(tapped, Stem, taps={0}), "names 'stem'"),
    "SharedBias": (shared_bias, "several names: 0.0.bias, 1.0.bias"),
    "hooked": (
        lambda: with_hook(lambda conv: lambda module, inputs, output: output + module.stem[0](inputs[0])),
        "a hook on the model itself names 'stem'",
    ),
    "hooked_by_closure": (
        lambda: with_hook(lambda conv: lambda module, inputs, output: output + conv(inputs[0])),
        "a hook on the model itself holds it",
    ),
    "forward_of_the_instance": (forward_of_the_instance, "replaced on the instance"),
}


def outputs(model):
    """The outputs in both domains, and with each argument if there is one."""
    found = []
    for domain in (1, 0):
        model.domain = domain
        found += [model(X), model(X, raw=True)] if type(model).__name__ == "RawByArgument" else [model(X)]
    return found


@pytest.mark.parametrize("name", USES)
def test_other_uses_are_noticed(name):
    make, says = USES[name]
    torch.manual_seed(0)
    model = settle(make()).eval()
    with torch.no_grad():
        expected = outputs(model)
        with unchanged(model):
            report = rir.fold_bn_(model, dry_run=True)
            assert rir.fold_bn_(model) is model
        torch.testing.assert_close(outputs(model), expected, **EXACT)
    assert not report.replaced
    assert any(says in item.reason for item in report.skipped), report


BORROWED = []


def weight_by_global():
    """No forward shows that the weight is the convolution's; that tensor keeps its values."""
    model = with_forward(lambda m, x: F.conv_transpose2d(m.stem(x), BORROWED[-1]), Stem)()
    BORROWED.append(model.stem[0].weight)
    return model


def blocks():
    """Two chains; the norm of the second has another use."""
    kind = with_forward(lambda m, x: m[1](m[0](x)) + m[1].stem[1].weight.sum(), nn.Sequential)
    return kind(Stem(), Stem())


def untraced_around():
    """The model reads another module's weight, and calls the chain as a whole."""

    def forward(m, x):
        y = m.stem(x.to(m.head.weight.dtype))
        return y if float(y.detach().sum()) > -1e9 else 2 * y

    model = with_forward(forward, Stem)()
    model.head = nn.Linear(4, 4)
    return model


def twice():
    """One unit under two names, called twice: the chain is the same each time."""
    shared = unit()
    return nn.Sequential(shared, shared)


def observed():
    seen = []
    return with_hook(lambda conv: lambda module, inputs, output: seen.append(output.shape))


# folding does not change the attribute that it reads of the convolution
Harmless = with_forward(lambda m, x: m.stem(F.pad(x, [m.stem[0].stride[0]] * 4)), Stem)


@pytest.mark.parametrize("make", [blocks, untraced_around, twice, observed, Harmless, weight_by_global, unit])
def test_other_chains_are_folded(make):
    torch.manual_seed(0)
    model = settle(make()).eval()
    with torch.no_grad():
        expected = model(X)
        report = rir.fold_bn_(model, dry_run=True)
        rir.fold_bn_(model)
        torch.testing.assert_close(model(X), expected, **CLOSE)
    assert sum(isinstance(m, FoldedNorm) for m in model.modules()) == len(report.replaced) == 1


def test_the_report_says_what_would_be_done_and_what_stays():
    model = settle(blocks()).eval()
    report = rir.fold_bn_(model, dry_run=True)
    assert not any(isinstance(m, FoldedNorm) for m in model.modules())
    [item] = report.replaced
    assert (item.name, item.pattern, item.parts) == ("0.stem", "conv_bn", ("0", "1"))
    assert [item.name for item in report.skipped] == ["1.stem.1"]
    assert "would fold 1 operations, skipped 1" in str(report)
    after = rir.fold_bn_(rir.fold_bn_(model), dry_run=True)
    assert not after.replaced and after.skipped == report.skipped


def test_an_exception_leaves_each_chain_folded_or_not(monkeypatch):
    torch.manual_seed(0)
    model = settle(nn.Sequential(unit(), unit())).eval()
    made = []

    def failing(*args, **kwargs):
        made.append(args)
        if len(made) == 2:
            raise MemoryError
        return FoldedNorm(*args, **kwargs)

    monkeypatch.setattr("rir_kernels.surgery.fold.FoldedNorm", failing)
    with torch.no_grad():
        expected = model(X)
        with pytest.raises(MemoryError):
            rir.fold_bn_(model)
        torch.testing.assert_close(model(X), expected, **CLOSE)
    assert [type(part[1]) for part in model] == [FoldedNorm, nn.BatchNorm2d]


def test_other_references_to_a_weight_keep_its_values():
    model = settle(unit()).eval()
    weight = model[0].weight
    before, seen_elsewhere = weight.detach().clone(), nn.Parameter(weight.detach())  # one storage
    rir.fold_bn_(model)
    assert isinstance(model[1], FoldedNorm) and model[0].weight is not weight
    assert torch.equal(weight, before) and torch.equal(seen_elsewhere, before)
