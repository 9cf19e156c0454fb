"""fold_bn_ in fp64, where folding moves a result by a few roundings; the tolerance is surgery_helpers'."""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.surgery.folded_norm import FoldedNorm
from tests.support.surgery_helpers import CLOSE, X, fused_calls, randn, settle
from tests.support.surgery_models import Block, Generalized, PreBlock


def count(model, kind):
    return sum(type(m) is kind for m in model.modules())


def downsample():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def scaled():
    block = Block()
    block.scale = 0.5
    return block


# (model, inputs, norms that are folded into a convolution, norms that become an affine map, norms that stay)
MODELS = {
    "conv_bn_act": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 1, 1, 0, 0),
    "P2, bias and grouped": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), 1, 1, 0, 0),
    "no affine": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)), 1, 1, 0, 0),
    "conv_bn_add_act": (Block(downsample()), 1, 3, 0, 0),
    "conv_bn_scaled_add_act": (scaled(), 1, 2, 0, 0),
    "bn_act": (PreBlock(), 1, 1, 0, 1),
    "P4, traced": (Generalized(), 2, 0, 1, 0),
    "P4, reference layer": (reference.RiRLayer(4, 4), 1, 0, 2, 0),
    "P4, layer": (rir.RiRLayer(4, 4), 1, 0, 1, 0),
    "P4, block": (rir.RiRBlock(4, 6, stride=2), 1, 0, 2, 0),
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
    assert count(folded, nn.BatchNorm2d) == left
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


def test_there_is_no_way_back():
    model = nn.Sequential(Block(), nn.Flatten()).eval()
    rir.fuse_(model)
    rir.fold_bn_(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="no way back"):
        rir.unfuse_(model)
    assert kinds == [type(m) for m in model.modules()]


def test_training_mode_is_refused_before_anything_changes():
    model = settle(Block(downsample())).eval()
    model.bn2.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"bn2 is in training mode.*eval\(\)"):
        rir.fold_bn_(model)
    assert count(model, FoldedNorm) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(TypeError):
        rir.fold_bn_(lambda x: x)


def _shared_convolution():
    model = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)])
    model[1][0] = model[0][0]
    return model


def _tied_weight():
    model = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)])
    model[1][0].weight = model[0][0].weight
    return model


def _hooked():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _without_statistics():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


def _between():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout2d(), nn.BatchNorm2d(4))


@pytest.mark.parametrize("make", [_shared_convolution, _tied_weight, _hooked, _without_statistics, _between])
def test_left_alone(make):
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    rir.fold_bn_(model)
    assert count(model, FoldedNorm) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_half_precision():
    """Folded in fp32 and cast: as near to fp64 as the model that is cast with its norm, within twice its error."""
    torch.manual_seed(0)
    golden = settle(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
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
