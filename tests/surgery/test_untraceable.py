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


GENERATOR, NUMBERS, TORCHS, NOISE = random.Random(0), np.random.default_rng(0), torch.Generator(), torch.ones(())
DRAW = GENERATOR.random


def with_a_generator(m, x, generator=GENERATOR):
    return m.block(x) if generator.random() < 0.5 else x


def of_a_closure():
    generator = random.Random(0)
    return lambda m, x: m.block(x) if generator.random() < 0.5 else x


def autocast_off(m, x):
    with torch.autocast("cpu", enabled=False):
        return m.block(x)


@torch.autocast("cpu", enabled=False)
def autocast_decorates(m, x):
    return m.block(x)


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
    "autocast asked": (lambda m, x: m.block(x) * (2 if torch.is_autocast_enabled("cpu") else 1), "autocast"),
    "dtype of autocast": (lambda m, x: m.block(x).to(torch.get_autocast_dtype("cpu")), "autocast"),
    "autocast off": (autocast_off, "autocast"),
    "autocast decorates": (lambda m, x: autocast_decorates(m, x), "autocast"),
    "generator": (lambda m, x: m.block(x) if GENERATOR.random() < 0.5 else x, "GENERATOR"),
    "its method": (lambda m, x: m.block(x) if DRAW() < 0.5 else x, "DRAW"),
    "generator of NumPy": (lambda m, x: m.block(x) if NUMBERS.random() < 0.5 else x, "NUMBERS"),
    "generator of torch": (lambda m, x: x if torch.rand((), generator=TORCHS) < 0.5 else m.block(x), "TORCHS"),
    "of a default": (with_a_generator, "__defaults__"),
    "of a closure": (of_a_closure(), "random"),
    "a tensor": (lambda m, x: m.block(x) * NOISE, "NOISE"),
    "__dict__": (lambda m, x: m.block(x) * m.__dict__.get("absent", 1), "__dict__"),
    "vars": (lambda m, x: m.block(x) * vars(m).get("absent", 1), "vars"),
    "globals": (lambda m, x: m.block(x) * globals().get("ABSENT", 1), "globals"),
    "eval": (lambda m, x: m.block(x) * eval("NOISE.dim()"), "eval"),
}


def states():
    """The states of all generators that forward may draw from."""
    ours = GENERATOR.getstate(), NUMBERS.bit_generator.state, TORCHS.get_state().tolist()
    _, numbers, position, *_ = np.random.get_state()
    return *ours, random.getstate(), numbers.tolist(), position, torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, reason = REFUSED[name]
    kind = with_forward(function)
    model = kind()
    model.options = {"scale": [2.0]}
    before, generators = dict(model.__dict__), states()
    report = fuse_(model)
    assert not report.replaced and reason in report.skipped[0].reason, str(report)
    assert type(model) is kind and model.__dict__ == before and states() == generators
    assert "__getattribute__" not in nn.Module.__dict__ and model.train(False).training is False
