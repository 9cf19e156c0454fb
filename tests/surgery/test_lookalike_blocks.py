"""Blocks may have the attribute names of well-known ones and compute something else: fuse_ preserves what they compute.

Each is compared in training and in evaluation with its unfused copy; the table says how much of it may be fused.
"""

from collections import OrderedDict, defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.surgery_helpers import X, assert_same, fused_calls, pair_of, settle
from tests.support.surgery_models import Block, with_forward


class Lookalike(Block):
    """An ordinary block, until another forward or child replaces its own."""

    def __init__(self, **children):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))
        for name, child in children.items():
            setattr(self, name, child)


def branch(m, x):
    return m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))


def subtracted(m, x):
    out = branch(m, x)
    out -= x
    return m.relu(out)


def into_the_identity(m, x):
    identity = seen = x.clone()
    identity += branch(m, x)
    return F.relu(identity) + seen


def added_after_an_in_place_relu(m, x):
    normed = m.bn1(m.conv1(x))
    return m.bn2(m.conv2(m.relu(normed))) + normed


def identity_overwritten(m, x):
    """The identity changes between the norm and the sum; the fused operation runs after that, too."""
    identity = x.clone()
    out = branch(m, x)
    identity.mul_(2)
    return m.relu(out + identity)


def overwritten_by_a_child(m, x):
    """A forward that tracing does not see overwrites the residual before the ReLU."""
    identity = x.clone()
    out = branch(m, x) + identity
    doubled = m.downsample(identity)
    return m.relu(out) + doubled


def convolution_used_twice(m, x):
    out = m.conv2(m.relu(m.bn1(m.conv1(x))))
    return m.relu(m.bn2(out)) + out


def norm_used_twice(m, x):
    out = branch(m, x)
    return m.relu(out) + out


def added_to_itself(m, x):
    out = branch(m, x)
    return m.relu(out + out)


def functional_norm(m, x):
    """bn2 is there, but its statistics are not used."""
    out = m.conv2(m.relu(m.bn1(m.conv1(x))))
    return m.relu(F.batch_norm(out, None, None, m.bn2.weight, m.bn2.bias, True) + x)


class DoublesInPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


CBA, CB, CBAA = "conv_bn_act", "conv_bn", "conv_bn_add_act"
# (forward, patterns that may be fused)
FORWARDS = {
    "subtracted": (subtracted, [CBA, CB]),
    "into the identity": (into_the_identity, [CBA, CB]),
    "added after an in place relu": (added_after_an_in_place_relu, [CB, CBAA]),
    "identity overwritten": (identity_overwritten, [CBA, CBAA]),
    "overwritten by a child": (overwritten_by_a_child, [CBA]),
    "convolution used twice": (convolution_used_twice, [CBA, "bn_act"]),
    "norm used twice": (norm_used_twice, [CBA, CB]),
    "added to itself": (added_to_itself, [CBA, CB]),
    "functional norm": (functional_norm, [CBA]),
    # weights are shared, which the operation allows
    "convolution called twice": (lambda m, x: m.relu(m.bn2(m.conv2(m.relu(m.bn1(m.conv2(x))))) + x), [CBA, CBAA]),
    # each forward updates the statistics twice
    "norm called twice": (lambda m, x: m.relu(m.bn1(m.conv2(m.relu(m.bn1(m.conv1(x))))) + x), []),
    "scaled by a tensor": (lambda m, x: m.relu(branch(m, x) * m.gate + x), [CBA, CB]),
    "scaled residual": (lambda m, x: m.relu(branch(m, x) + 0.5 * x), [CBA, CBAA]),
    "added with alpha": (lambda m, x: m.relu(torch.add(branch(m, x), x, alpha=2)), [CBA, CB]),
    "activation between": (lambda m, x: m.bn2(torch.tanh(m.conv2(m.bn1(m.relu(m.conv1(x)))))) + x, []),
    "dropout between": (lambda m, x: m.relu(m.bn2(m.drop(m.conv2(m.relu(m.bn1(m.conv1(x)))))) + x), [CBA]),
    # fused, but each call sees a residual of another shape and adds it as torch does
    "broadcast residual": (lambda m, x: m.relu(branch(m, x) + x.mean((2, 3), keepdim=True)), [CBA, CBAA]),
    "depends on the mode": (lambda m, x: m.relu(branch(m, x) + x) if m.training else m.relu(branch(m, x)), []),
}
# an ordinary block with another child: (children, patterns)
CHILDREN = {
    "none": (dict, [CBA, CBAA]),
    "GroupNorm": (lambda: {"bn1": nn.GroupNorm(2, 4)}, [CBAA]),
    "InstanceNorm2d": (lambda: {"bn2": nn.InstanceNorm2d(4, affine=True)}, [CBA]),
    "LeakyReLU": (lambda: {"relu": nn.LeakyReLU(0.2)}, [CB, CBAA]),
    "ReLU6": (lambda: {"relu": nn.ReLU6()}, [CB, CBAA]),
}


def _cases():
    for name, (forward, patterns) in FORWARDS.items():
        yield pytest.param(
            lambda forward=forward: with_forward(forward, Lookalike)(downsample=DoublesInPlace(), drop=nn.Dropout()),
            patterns, int(name == "broadcast residual"), id=name,
        )  # fmt: skip
    for name, (children, patterns) in CHILDREN.items():
        yield pytest.param(lambda children=children: Lookalike(**children()), patterns, 0, id=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "patterns", "fallbacks"), list(_cases()))
def test_lookalikes(make, patterns, fallbacks, training):
    torch.manual_seed(0)
    fused, original = pair_of(settle(make()).train(training), patterns)
    state = torch.get_rng_state()

    def reseed(module, _inputs):  # so that both draw the same dropout mask
        torch.set_rng_state(state)

    for module in (original, fused):
        module.register_forward_pre_hook(reseed)
    assert_same(fused, original, X, calls=len(patterns) - fallbacks)


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu"])
def test_children_shared_between_blocks(name):
    torch.manual_seed(0)
    original = settle(nn.Sequential(Lookalike(), Lookalike()))
    setattr(original[1], name, getattr(original[0], name))
    fused, _ = pair_of(original, 4)
    assert_same(fused, original, X, calls=4)
    assert getattr(fused[0], name) is getattr(fused[1], name)


def ordered(m, x):
    return OrderedDict({m.names["out"]: m.block(x)})


def defaulting(m, x):
    found = defaultdict(list)
    found["features"] = m.block(x)
    return found


def counting(m, x):
    """One number has two names, and one of them is counted up."""
    y = m.block(x)
    rows = wanted = y.shape[2]
    wanted += 1
    return {"features": y, "rows": rows, "wanted": wanted}


@pytest.mark.parametrize(("forward", "operations"), [(ordered, 1), (defaulting, 0), (counting, 1)])
def test_results_keep_their_type(forward, operations):
    model = settle(with_forward(forward)()).eval()
    model.names = {"out": "features"}
    fused, original = pair_of(model, operations)
    found, expected = fused(X), original(X)
    assert type(found) is type(expected) and list(found) == list(expected)
    torch.testing.assert_close(dict(found), dict(expected))
    if forward is ordered:
        fused.names["out"] = "other"
        with fused_calls(0):
            assert list(fused(X)) == ["other"]
