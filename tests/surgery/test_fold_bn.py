"""fold_bn_ in fp64: folding changes a result only by a few roundings."""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.surgery.folded_norm import FoldedNorm
from tests.support.surgery_helpers import (
    CLOSE,
    X,
    double_output,
    fused_calls,
    randn,
    settle,
    unchanged,
)
from tests.support.surgery_models import Block, Generalized, PreBlock, downsample, unit

# (model, inputs, norms that are folded into a convolution, norms that become an affine map, norms that stay)
MODELS = {
    "conv_bn_act": (unit(), 1, 1, 0, 0),
    "conv_bn, bias and grouped": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), 1, 1, 0, 0),
    "no affine": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)), 1, 1, 0, 0),
    "conv_bn_add_act": (Block(downsample()), 1, 3, 0, 0),
    "conv_bn_scaled_add_act": (Block(scale=0.5), 1, 2, 0, 0),
    "bn_act": (PreBlock(), 1, 1, 0, 1),
    "conv_add_bn_act, traced": (Generalized(), 2, 0, 1, 0),
    "conv_add_bn_act, reference layer": (reference.RiRLayer(4, 4), 1, 0, 2, 0),
    "conv_add_bn_act, layer": (rir.RiRLayer(4, 4), 1, 0, 1, 0),
    "conv_add_bn_act, block": (rir.RiRBlock(4, 6, stride=2), 1, 0, 2, 0),
    "unit": (rir.ConvBNAct(4, 4, 3), 1, 1, 0, 0),
    "unit, the norm after the sum": (rir.ConvBNAct(4, 4, 3, residual_at="pre_norm"), 2, 0, 1, 0),
    "reference unit": (reference.ConvBNAct(4, 4, 3, bias=True), 2, 1, 0, 0),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", ["folded", "fused, folded", "folded, fused"])
def test_folded(name, order):
    model, inputs, into_conv, affine, left = MODELS[name]
    torch.manual_seed(0)
    original = settle(copy.deepcopy(model)).eval()
    inputs = [X, randn(2, 4, 6, 6, seed=1)][:inputs]
    folded = copy.deepcopy(original)
    if order == "fused, folded":
        rir.fuse_(folded)
    assert rir.fold_bn_(folded) is folded
    if order == "folded, fused":
        rir.fuse_(folded)
    found = [m for m in folded.modules() if isinstance(m, FoldedNorm)]
    assert sum(m.weight is None for m in found) == into_conv and sum(m.weight is not None for m in found) == affine
    assert sum(type(m) is nn.BatchNorm2d for m in folded.modules()) == left
    with torch.no_grad():
        expected = original(*inputs)
        torch.testing.assert_close(folded(*inputs), expected, **CLOSE)
        torch.testing.assert_close(copy.deepcopy(folded)(*inputs), expected, **CLOSE)
        if left == 0:  # a norm that stays would take the batch's statistics
            torch.testing.assert_close(folded.train()(*inputs), expected, **CLOSE)


def test_a_folded_model_runs_fused():
    model = settle(Block(downsample())).eval()
    rir.fuse_(model)
    rir.fold_bn_(model)
    with fused_calls(3):
        model(X)


def test_folding_cannot_be_undone():
    model = nn.Sequential(Block(), nn.Flatten()).eval()
    rir.fuse_(model)
    rir.fold_bn_(model)
    with unchanged(model), pytest.raises(RuntimeError, match="no way back"):
        rir.unfuse_(model)


def test_training_mode_is_refused_before_anything_changes():
    model = settle(Block(downsample())).eval()
    model.bn2.train()
    with unchanged(model), pytest.raises(ValueError, match=r"bn2 is in training mode.*eval\(\)"):
        rir.fold_bn_(model)
    with pytest.raises(TypeError):
        rir.fold_bn_(lambda x: x)


def _two(share):
    model = nn.ModuleList([downsample(), downsample()])
    share(*model)
    return model


def _hooked():
    model = downsample()
    double_output(model[0])
    return model


LEFT_ALONE = {
    "shared convolution": lambda: _two(lambda a, b: b.__setitem__(0, a[0])),
    "tied weight": lambda: _two(lambda a, b: setattr(b[0], "weight", a[0].weight)),
    "hook": _hooked,
    "no statistics": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    "dropout between": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout2d(), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_not_folded(name):
    model = LEFT_ALONE[name]().eval()
    with unchanged(model):
        rir.fold_bn_(model)


def test_half_precision():
    """The model folded in fp32 and cast is within twice the error of the unfolded model that is cast."""
    torch.manual_seed(0)
    golden = settle(unit()).eval()
    folded, cast = copy.deepcopy(golden).float(), copy.deepcopy(golden).half()
    rir.fold_bn_(folded).half()
    x = X.half()
    with torch.no_grad():
        exact = golden(x.double())
        error, budget = ((model(x) - exact).abs().max() for model in (folded, cast))
    assert error <= 2 * budget + 2 * torch.finfo(torch.half).eps * exact.abs().max()


def test_statistics_of_zero_and_one_are_exact():
    norm = FoldedNorm(4, activation=None, like=torch.zeros(1))
    conv = nn.Conv2d(4, 4, 1, bias=False)
    with torch.no_grad():
        found = rir.surgery.conv_bn_act(X.float(), conv, norm, None)
        assert torch.equal(found, conv(X.float()))
