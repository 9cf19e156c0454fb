"""What the tests of bad inputs are tried on: implementations, and modules beside the plain PyTorch they stand for."""

import copy
import functools

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from tests.helpers import assert_within_budget, formula, output_gradient, run, scrambled

# (implementation, where its tensors are); kernels run in Triton's interpreter, or on a GPU where there is one
WAYS = [
    pytest.param("torch", "cpu", id="torch"),
    pytest.param("triton", "cpu", marks=pytest.mark.interpreter, id="triton"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu, id="triton-cuda"),
]
ways = pytest.mark.parametrize(("impl", "where"), WAYS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class ConvNormReLU(nn.Module):
    """ConvBNAct's names, in torch's own modules."""

    def __init__(self, in_channels=4, out_channels=6):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def _layer(impl):
    ours = scrambled(rir.RiRLayer(4, 6, shortcut="projection", impl=impl))
    return ours, ours.to_reference()


def _block(impl):
    ours = scrambled(rir.RiRBlock(4, 6, impl=impl))
    return ours, ours.to_reference()


def _unit(impl):
    theirs = scrambled(ConvNormReLU())
    ours = rir.ConvBNAct(4, 6, 3, impl=impl)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _fused(impl):
    theirs = scrambled(ConvNormReLU())
    ours = copy.deepcopy(theirs)
    assert rir.fuse_(ours, impl=impl).replaced
    return ours, theirs


# (ours, theirs) of 4 channels in and 6 out, with the same values; theirs is torch's own modules
FORMS = {"layer": _layer, "block": _block, "unit": _unit, "fused": _fused}


def make_pair(form, impl="auto", where="cpu"):
    torch.manual_seed(0)
    ours, theirs = FORMS[form](impl)
    return ours.to(where), theirs.to(where)


forms = pytest.mark.parametrize("form", FORMS)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def moved(tensors, where):
    return {name: t.to(where) for name, t in tensors.items()}


def by(impl, function=rir.functional.conv_bn_act):
    return functools.partial(function, impl=impl)


def check_call(tensors, options, impl, where="cpu", margin=1e-3):
    """Outputs, gradients and statistics within twice torch's own error; margin as in `output_gradient`."""
    dtype = tensors["x"].dtype
    dy = output_gradient(tensors, options, margin).to(where)
    tensors = moved(tensors, where)
    golden = run(formula, tensors, options, dy, dtype=torch.float64)
    torchs = run(reference.conv_bn_act, tensors, options, dy)
    ours = run(by(impl), tensors, options, dy)
    assert_within_budget(ours, torchs, golden, dtype)
    return ours


@pytest.fixture
def launches(monkeypatch):
    """A list that grows with every kernel that is started, in the interpreter and on a GPU."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from rir_kernels.triton.launch.plan import Plan

    started = []
    for owner, name in ((GridExecutor, "__call__"), (JITFunction, "run"), (Plan, "__call__")):
        start = getattr(owner, name)

        def watched(*args, _start=start, **options):
            started.append(_start)
            return _start(*args, **options)

        monkeypatch.setattr(owner, name, watched)
    return started
