"""fuse_ refuses a forward that no graph can stand for, gives the reason, and changes nothing."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rir_kernels.surgery import fuse_
from tests.support.surgery_models import with_forward


def sets_an_attribute(m, x):
    m.calls = 1
    return m.block(x)


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


REFUSED = {
    "depends on values": (lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else x, "cannot be traced"),
    "asks for the type": (lambda m, x: m.block(x) if isinstance(x, torch.Tensor) else x, "asks what type"),
    "random": (lambda m, x: m.block(x) * random.random(), "random"),
    "random of NumPy": (lambda m, x: m.block(x) * np.random.random(), "random"),
    "random of torch": (lambda m, x: m.block(x) * float(torch.rand(())), "random"),
    "makes a tensor": (lambda m, x: m.block(x) * torch.ones(1), "makes a tensor"),
    "sets an attribute": (sets_an_attribute, "sets the attribute 'calls'"),
    "other in training": (other_in_training, "another one in evaluation"),
    "other without gradients": (other_without_gradients, "without gradients"),
    "partly without gradients": (partly_without_gradients, "under no_grad"),
    "partly in autocast": (partly_in_autocast, "autocast"),
    "checkpointed": (checkpointed, "checkpointing"),
    "reads a dict of more than constants": (lambda m, x: m.block(x) * m.options["scale"][0], "'options', a dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, reason = REFUSED[name]
    kind = with_forward(function)
    model = kind()
    model.options = {"scale": [2.0]}
    before, numbers = dict(model.__dict__), (random.getstate(), torch.get_rng_state())
    np.random.seed(3)
    expected = np.random.RandomState(3).random()
    report = fuse_(model)
    assert not report.replaced and reason in report.skipped[0].reason
    assert type(model) is kind and model.__dict__ == before
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])
    assert np.random.random() == expected
    assert "__getattribute__" not in nn.Module.__dict__ and model.train(False).training is False
