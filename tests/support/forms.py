"""The implementations and modules that the tests of bad inputs run, and the same modules in plain PyTorch."""

import copy
import functools

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.support.emulation import gpu
from tests.support.helpers import assert_within_budget, formula, output_gradient, run, scrambled

# (implementation, device of its tensors); the kernels run in Triton's interpreter, or on a GPU if there is one
WAYS = [
    pytest.param("torch", "cpu", id="torch"),
    pytest.param("triton", "cpu", marks=pytest.mark.interpreter, id="triton"),
    pytest.param("triton", gpu().type, marks=pytest.mark.gpu, id="triton-cuda"),
]
ways = pytest.mark.parametrize(("impl", "where"), WAYS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class ConvNormReLU(nn.Module):
    """torch's modules under ConvBNAct's names."""

    def __init__(self, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def _rir(kind, kernel_size, impl, **options):
    ours = scrambled(kind(4, 6, kernel_size=kernel_size, impl=impl, **options))
    return ours, ours.to_reference()


def _unit(kernel_size, impl):
    theirs = scrambled(ConvNormReLU(kernel_size))
    ours = rir.ConvBNAct(4, 6, kernel_size, impl=impl)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _fused(kernel_size, impl):
    theirs = scrambled(ConvNormReLU(kernel_size))
    ours = copy.deepcopy(theirs)
    assert rir.fuse_(ours, impl=impl).replaced
    return ours, theirs


# (ours, theirs) with 4 channels in and 6 out and the same values; theirs consists of torch's modules
FORMS = {
    "layer": functools.partial(_rir, rir.RiRLayer, shortcut="projection"),
    "block": functools.partial(_rir, rir.RiRBlock),
    "unit": _unit,
    "fused": _fused,
}


def make_pair(form, impl="auto", where="cpu"):
    torch.manual_seed(0)
    # one tap for the interpreter, where nine would take nine times as long
    ours, theirs = FORMS[form](1 if impl == "triton" else 3, impl)
    return ours.to(where), theirs.to(where)


forms = pytest.mark.parametrize("form", FORMS)
checked_forms = pytest.mark.parametrize("form", [form for form in FORMS if form != "fused"])  # our code checks these


def refused_as_unfused(x):
    """A fused unit raises what the unfused module raises, and leaves the same state behind."""
    ours, theirs = make_pair("fused")
    with pytest.raises(Exception) as expected:
        theirs(x)
    with pytest.raises(Exception) as found:
        ours(x)
    assert (found.type, str(found.value)) == (expected.type, str(expected.value))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def by_every_form(kernels=("layer", "fused")):
    """Parametrizes (form, impl, where): every form runs with torch's operators, and `kernels` with the kernels, too."""
    return pytest.mark.parametrize(
        ("form", "impl", "where"),
        [
            pytest.param(form, *way.values, marks=way.marks, id=f"{form}-{way.id}")
            for way in WAYS
            for form in (FORMS if way.values[0] == "torch" else kernels)
        ],
    )


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def moved(tensors, where):
    return {name: t.to(where) for name, t in tensors.items()}


def by(impl, function=rir.functional.conv_bn_act):
    return functools.partial(function, impl=impl)


def check_call(
    tensors, options, impl, where="cpu", formula=formula, function=rir.functional.conv_bn_act, *, margin=1e-3,
    backward=True,
):  # fmt: skip
    """Outputs, gradients and statistics are within twice torch's error; margin: see `output_gradient`."""
    dtype = tensors["x"].dtype
    dy = output_gradient(tensors, options, margin, function=formula).to(where) if backward else None
    tensors = moved(tensors, where)
    golden = run(formula, tensors, options, dy, dtype=torch.float64)
    torchs, ours = (run(by(i, function), tensors, options, dy) for i in ("reference", impl))
    assert_within_budget(ours, torchs, golden, dtype)
    return ours


@pytest.fixture
def launches(monkeypatch):
    """A list that grows with every kernel launch, in the interpreter and on a GPU."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from rir_kernels.triton.plan.plan import Plan

    started = []
    for owner, name in ((GridExecutor, "__call__"), (JITFunction, "run"), (Plan, "__call__")):
        start = getattr(owner, name)

        def watched(*args, _start=start, **options):
            started.append(_start)
            return _start(*args, **options)

        monkeypatch.setattr(owner, name, watched)
    return started
