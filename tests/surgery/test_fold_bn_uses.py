"""fold_bn_ changes nothing that the model uses otherwise than in the chain: outputs in fp64, before and after.

The tolerance is surgery_helpers'. Each model computes something else if the convolution or the norm is folded blindly.
"""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from rir_kernels.surgery.folded_norm import FoldedNorm
from tests.support.surgery_helpers import CLOSE, X, settle


def unit():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = unit()

    def forward(self, x):
        return self.stem(x)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)


class ConvAgain(Stem):
    def forward(self, x):
        return self.stem(x) + self.stem[0](x + 1)


class ConvUnderTwoNorms(Flat):
    def forward(self, x):
        return F.relu(self.norm(self.conv(x))) + F.relu(self.other(self.conv(x)))


class ConvByAnotherModule(Stem):
    class Head(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.borrowed = [conv]

        def forward(self, x):
            return self.borrowed[0](x)

    def __init__(self):
        super().__init__()
        self.head = self.Head(self.stem[0])

    def forward(self, x):
        return self.stem(x) + self.head(x)


class ConvByWeakReference(Stem):
    def forward(self, x):
        return self.stem(x) + self.borrowed()(x)

    def lend(self):
        self.borrowed = weakref.ref(self.stem[0])
        return self


class NormByAttribute(Flat):
    domain = 0

    def forward(self, x):
        return F.relu((self.norm if self.domain == 0 else self.other)(self.conv(x)))


class NormFromList(nn.Module):
    domain = 0

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(4, 4, 1), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        return F.relu(self.norms[self.domain](self.conv(x)))


class ConvByAttribute(nn.Module):
    domain = 0

    def __init__(self):
        super().__init__()
        self.convs, self.norm = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.convs[self.domain](x)))


class RawByArgument(Flat):
    def forward(self, x, raw=False):
        y = self.conv(x)
        return y if raw else F.relu(self.norm(y))


class TiedDecoder(Stem):
    def forward(self, x):
        return F.conv_transpose2d(self.stem(x), self.stem[0].weight)


class BiasRead(Stem):
    def forward(self, x):
        return self.stem(x) + self.stem[0].bias.sum()


class GammaRead(Stem):
    def forward(self, x):
        return self.stem(x) + self.stem[1].weight.abs().sum()


class MeanRead(Stem):
    def forward(self, x):
        return self.stem(x - self.stem[1].running_mean.mean())


def penalty(model):
    return sum(norm.weight.abs().sum() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


class Untraced(Stem):
    """A forward that no graph stands for."""

    def forward(self, x):
        y = self.stem(x)
        return self.more(y, x) if float(y.detach().sum()) > -1e9 else y

    def more(self, y, x):
        return y + self.stem[1].weight.abs().sum()


class UntracedTraversal(Untraced):
    def more(self, y, x):
        return y + penalty(self)


class UntracedParameters(Untraced):
    def more(self, y, x):
        return y + sum(p.abs().sum() for p in self.parameters())


class UntracedPath(nn.Module):
    """It calls the convolution of a child, which calls it too."""

    class Child(Flat):
        def forward(self, x):
            return F.relu(self.norm(self.conv(x)))

    def __init__(self):
        super().__init__()
        self.child = self.Child()
        del self.child.other

    def forward(self, x):
        y = self.child(x)
        return y + self.child.conv(x) if float(y.detach().sum()) > -1e9 else y


class Taps(Stem):
    """As perceptual losses take features out of a network."""

    def __init__(self):
        super().__init__()
        self.taps = {0}

    def forward(self, x):
        found = []
        for i, layer in enumerate(self.stem):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return sum(found) + x


class TypeAsked(Stem):
    def forward(self, x):
        for layer in self.stem:
            x = 2 * layer(x) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = unit(), unit()
        self.b[0].bias = self.a[0].bias

    def forward(self, x):
        return self.a(x) + self.b(x)


def hooked():
    model = Stem()
    model.register_forward_hook(lambda module, inputs, output: output + module.stem[0](inputs[0]))
    return model


def hooked_by_closure():
    model = Stem()
    conv = model.stem[0]
    model.register_forward_hook(lambda module, inputs, output: output + conv(inputs[0]))
    return model


def forward_of_the_instance():
    model = nn.Sequential(unit())
    model[0].forward = lambda x: model[0][0](x)
    return model


# model: what the report says among others
USES = {
    ConvAgain: "stem.0 is also called in the forward of the model itself",
    ConvUnderTwoNorms: "conv is called more than once",
    ConvByAnotherModule: "the forward of head holds it",
    lambda: ConvByWeakReference().lend(): "the model itself holds it",
    NormByAttribute: "may call other in its place",
    NormFromList: "",
    ConvByAttribute: "may call convs.1 in its place",
    RawByArgument: "is another one with other arguments",
    TiedDecoder: "'weight' of stem.0 is read",
    BiasRead: "'bias' of stem.0 is read",
    GammaRead: "'weight' of stem.1 is read",
    MeanRead: "'running_mean' of stem.1 is read",
    Untraced: "the forward of the model itself names 'stem'",
    UntracedTraversal: "names 'modules'",
    UntracedParameters: "names 'parameters'",
    UntracedPath: "names 'conv'",
    Taps: "names 'stem'",
    TypeAsked: "asks of which class stem.1 is",
    SharedBias: "several names: a.0.bias, b.0.bias",
    hooked: "a hook on the model itself names 'stem'",
    hooked_by_closure: "a hook on the model itself holds it",
    forward_of_the_instance: "replaced on the instance",
}


def outputs(model):
    """In both domains and with each argument, where it has such."""
    found = []
    for domain in (1, 0):
        model.domain = domain
        found += [model(X), model(X, raw=True)] if isinstance(model, RawByArgument) else [model(X)]
    return found


@pytest.mark.parametrize("make", USES)
def test_another_use_is_seen(make):
    torch.manual_seed(0)
    model = settle(make()).eval()
    with torch.no_grad():
        expected = outputs(model)
        state = copy.deepcopy(model.state_dict())
        report = rir.fold_bn_(model, dry_run=True)
        assert rir.fold_bn_(model) is model
        for found, value in zip(outputs(model), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=0)
    assert not report.replaced
    assert any(USES[make] in item.reason for item in report.skipped), report
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


BORROWED = []


class WeightByGlobal(Stem):
    """No forward shows that it is the convolution's: it keeps its values."""

    def forward(self, x):
        return F.conv_transpose2d(self.stem(x), BORROWED[-1])

    def lend(self):
        BORROWED.append(self.stem[0].weight)
        return self


class Blocks(nn.Module):
    """Two chains, one of which is used otherwise."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Stem(), Stem()

    def forward(self, x):
        return self.second(self.first(x)) + self.second.stem[1].weight.sum()


class UntracedAround(Stem):
    """It reads another module's weight, and calls the chain as a whole."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        y = self.stem(x.to(self.head.weight.dtype))
        return y if float(y.detach().sum()) > -1e9 else 2 * y


class Twice(nn.Module):
    """One unit under two names, called twice: the chain is the same each time."""

    def __init__(self):
        super().__init__()
        self.a = unit()
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


def observed():
    model, seen = Stem(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    return model


class Harmless(Stem):
    """What it reads of the convolution is not changed."""

    def forward(self, x):
        return self.stem(F.pad(x, [self.stem[0].stride[0]] * 4))


@pytest.mark.parametrize(
    "make", [Blocks, UntracedAround, Twice, observed, Harmless, lambda: WeightByGlobal().lend(), unit]
)
def test_what_is_used_in_the_chain_only_is_folded(make):
    torch.manual_seed(0)
    model = settle(make()).eval()
    with torch.no_grad():
        expected = model(X)
        report = rir.fold_bn_(model, dry_run=True)
        rir.fold_bn_(model)
        torch.testing.assert_close(model(X), expected, **CLOSE)
    assert sum(isinstance(m, FoldedNorm) for m in model.modules()) == len(report.replaced) == 1


def test_the_report_says_what_would_be_done_and_what_stays():
    model = settle(Blocks()).eval()
    report = rir.fold_bn_(model, dry_run=True)
    assert not any(isinstance(m, FoldedNorm) for m in model.modules())
    [item] = report.replaced
    assert (item.name, item.pattern, item.parts) == ("first.stem", "conv_bn", ("0", "1"))
    assert [item.name for item in report.skipped] == ["second.stem.1"]
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


def test_what_else_refers_to_a_weight_keeps_its_values():
    model = settle(unit()).eval()
    weight = model[0].weight
    before, seen_elsewhere = weight.detach().clone(), nn.Parameter(weight.detach())  # one storage
    rir.fold_bn_(model)
    assert isinstance(model[1], FoldedNorm) and model[0].weight is not weight
    assert torch.equal(weight, before) and torch.equal(seen_elsewhere, before)
