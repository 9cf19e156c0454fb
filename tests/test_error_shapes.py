"""Bad shapes and statistics, and sizes that are odd but right.

The number in a test's name is a kind of bad input: 6 and 7 shapes, 8 and 9 odd sizes, 11 one value per channel, 21 eps,
22 momentum, 24 missing statistics. Empty batches (10) are in test_functional.py, norms without parameters or statistics
(23) in test_module_state.py.
"""

import math

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.refusals import call_arguments, call_refused, module_refused

conv_bn_act = rir.functional.conv_bn_act


def test_row_11_one_value_per_channel():
    """In torch's words, which the norm says after the convolution; we say them before it."""
    message = "Expected more than 1 value per channel when training, got input size"
    with pytest.raises(ValueError, match=message):
        nn.BatchNorm2d(6)(torch.zeros(1, 6, 1, 1))
    for impl in ("auto", "reference", "torch"):
        call_refused(ValueError, f"{message} (1, 6, 1, 1)", x=torch.randn(1, 4, 1, 1), residual=None, impl=impl)
    x = torch.randn(1, 4, 2, 2)
    for module in (
        rir.RiRLayer(4, 6, stride=2),
        rir.RiRBlock(4, 6, stride=2, shortcut="projection"),
        rir.ConvBNAct(4, 6, 3, stride=2),
    ):
        module_refused(module, ValueError, message, inputs=[x])
        assert module.eval()(x).shape == (1, 6, 1, 1)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, math.nan, math.inf, "1e-5", None, True])
def test_row_21_eps(eps):
    message = f"eps must be a positive number, got {eps!r}"
    for training in (True, False):
        call_refused(ValueError, message, eps=eps, training=training)
    for make in (lambda: rir.RiRLayer(4, 6, eps=eps), lambda: rir.ConvBNAct(4, 6, 3, eps=eps)):
        with pytest.raises(ValueError, match=r"eps must be a positive number"):
            make()
    for module in (rir.RiRLayer(4, 6), rir.ConvBNAct(4, 6, 3)):
        module.bn.eps = eps  # read at every call
        module_refused(module, ValueError, message, inputs=[torch.randn(2, 4, 5, 5)])


def test_row_22_momentum():
    """Numbers are not limited, as in torch. The cumulative average needs the count of batches, which a module has."""
    for momentum in (None, "0.1", True):
        call_refused(TypeError, f"momentum must be a number, got {momentum!r}", momentum=momentum)
    with pytest.raises(ValueError, match="momentum must be a number, or None"):
        rir.RiRLayer(4, 6, momentum="0.1")


@pytest.mark.parametrize("missing", [["running_mean", "running_var"], ["running_mean"], ["running_var"]])
def test_row_24_evaluation_without_statistics(missing):
    given = call_arguments() | dict.fromkeys(missing)
    with pytest.raises(RuntimeError) as torchs:
        nn.functional.batch_norm(torch.zeros(2, 6, 3, 3), given["running_mean"], given["running_var"], training=False)
    call_refused(RuntimeError, str(torchs.value), training=False, **dict.fromkeys(missing))
    if len(missing) == 1:
        call_refused(ValueError, "must either both be None or neither be None", **dict.fromkeys(missing))
