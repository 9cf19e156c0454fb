"""fuse_ on forwards that no graph stands for, and on what looks like a chain and is none: nothing comes out wrong."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import randn, settle
from tests.surgery.test_fx_traced import Variant

X = randn(2, 4, 6, 6)


def data_dependent(m, x):
    return m.bn(m.conv(x)) if x.sum() > 0 else x


def asks_the_type(m, x):
    return m.relu(m.bn(m.conv(x))) if isinstance(x, torch.Tensor) else x


def draws(m, x):
    return m.relu(m.bn(m.conv(x))) * random.random()


def draws_by_numpy(m, x):
    return m.relu(m.bn(m.conv(x))) * np.random.random()


def draws_by_torch(m, x):
    return m.relu(m.bn(m.conv(x))) * float(torch.rand(()))


def makes_a_tensor(m, x):
    return m.relu(m.bn(m.conv(x))) * torch.ones(1)


def counts(m, x):
    m.calls = 1
    return m.relu(m.bn(m.conv(x)))


def other_in_training(m, x):
    y = m.bn(m.conv(x))
    return m.relu(y) if m.training else y


def other_without_gradients(m, x):
    y = m.bn(m.conv(x))
    return m.relu(y) if torch.is_grad_enabled() else y


def partly_without_gradients(m, x):
    with torch.no_grad():
        y = m.bn(m.conv(x))
    return m.relu(y)


def partly_in_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.bn(m.conv(x))
    return m.relu(y)


def checkpointed(m, x):
    return m.relu(checkpoint(lambda x: m.bn(m.conv(x)), x, use_reentrant=False))


def reads_a_dict(m, x):  # of more than constants
    return m.relu(m.bn(m.conv(x))) * m.options["scale"][0]


REFUSED = {
    data_dependent: "cannot be traced",
    asks_the_type: "asks what type",
    draws: "random",
    draws_by_numpy: "random",
    draws_by_torch: "random",
    makes_a_tensor: "makes a tensor",
    counts: "sets the attribute 'calls'",
    other_in_training: "another one in evaluation",
    other_without_gradients: "without gradients",
    partly_without_gradients: "under no_grad",
    partly_in_autocast: "autocast",
    checkpointed: "checkpointing",
    reads_a_dict: "'options', a dict",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused(function):
    model = Variant(function)
    model.options = {"scale": [2.0]}
    before, numbers = dict(model.__dict__), (random.getstate(), torch.get_rng_state())
    np.random.seed(3)
    expected = np.random.RandomState(3).random()
    report = fuse_(model)
    assert not report.replaced and REFUSED[function] in report.skipped[0].reason
    assert type(model) is Variant and model.__dict__ == before
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])
    assert np.random.random() == expected
    assert "__getattribute__" not in nn.Module.__dict__ and model.train(False).training is False


def written_between(m, x):
    y = m.conv(x)
    x.mul_(2)
    return m.relu(m.bn(y) + x)


def read_twice(m, x):
    y = m.conv(x)
    return m.bn(y) + y.mean()


def added_into_the_identity(m, x):
    identity = kept = x * 1
    y = m.bn(m.conv(x))
    identity += y
    return m.relu(identity) + kept


def with_alpha(m, x):
    return m.relu(torch.add(m.bn(m.conv(x)), x, alpha=2))


def activation_between(m, x):
    return m.bn(m.relu(m.conv(x)))


def scaled_by_a_tensor(m, x):
    return m.relu(m.bn(m.conv(x)) * x.mean() + x)


def norm_twice(m, x):
    return m.relu(m.bn(m.conv(m.relu(m.bn(m.conv(x))))))


def normed_and_kept(m, x):
    y = m.bn(m.conv(x))
    return m.relu(y) + y


def to_itself(m, x):
    y = m.bn(m.conv(x))
    return m.relu(y + y)


# what looks like a chain and is none, with the calls that may be fused all the same
TRAPS = {
    written_between: 0, read_twice: 0, added_into_the_identity: 1, with_alpha: 1, activation_between: 0,
    scaled_by_a_tensor: 1, norm_twice: 0, normed_and_kept: 1, to_itself: 1,
}  # fmt: skip


@pytest.mark.parametrize("function", TRAPS, ids=lambda f: f.__name__)
def test_traps(function):
    torch.manual_seed(0)
    original = settle(Variant(function)).eval()  # torch refuses the backward of some
    fused = copy.deepcopy(original)
    assert len(fuse_(fused).replaced) == TRAPS[function]
    with torch.no_grad():
        torch.testing.assert_close(fused(X.clone()), original(X.clone()), rtol=1e-10, atol=1e-10)
