"""What the tests of bad inputs share: a call that works, and the check that a bad one raises and changes nothing."""

import contextlib

import pytest
import torch

import rir_kernels as rir
from tests.support.helpers import make_call


def call_arguments(**change):
    """A call that works, with the tensors a bad call must leave alone."""
    tensors, options = make_call(dtype=torch.float32, residuals=(4,), bias=True, padding=1, training=True)
    tensors["residual"] = tensors.pop("residual0")
    return tensors | options | change


def state_of(tensors):
    for t in tensors:
        if t.requires_grad and t.is_leaf and t.grad is None:
            t.grad = torch.ones_like(t)
    return [(t, t.detach().clone(), None if t.grad is None else t.grad.clone()) for t in tensors if not t.is_meta]


@contextlib.contextmanager
def refused(error, *fragments, leaves_alone):
    """The block raises `error`, saying every fragment, and changes neither these tensors nor their gradients."""
    before = state_of(leaves_alone)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error  # no subclass by accident
    for fragment in fragments:
        assert fragment in str(caught.value)
    for tensor, values, grad in before:
        assert torch.equal(tensor, values)
        assert grad is None or torch.equal(tensor.grad, grad)


def call_refused(error, *fragments, impl="auto", **change):
    arguments = call_arguments(**change)
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    for name in ("weight", "bn_weight", "bn_bias"):
        if isinstance(arguments[name], torch.Tensor) and arguments[name].is_floating_point():
            arguments[name].requires_grad_()
    with refused(error, *fragments, leaves_alone=tensors):
        rir.functional.conv_bn_act(**arguments, impl=impl)


def module_refused(module, error, *fragments, inputs):
    tensors = [*module.parameters(), *module.buffers(), *(t for t in inputs if isinstance(t, torch.Tensor))]
    with refused(error, *fragments, leaves_alone=tensors):
        module(*inputs)
