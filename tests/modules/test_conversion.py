"""to_reference and from_reference: nothing is computed, so every comparison is bitwise."""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.common.streams import pack_weight
from tests.support.helpers import scrambled

CHANNELS = pytest.mark.parametrize(("in_channels", "out_channels"), [(6, 6), (4, 9), (9, 4), (1, 5)])
FRACTIONS = pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 1])


def assert_same_state(ours, theirs):
    a, b = ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True)
    assert list(a) == list(b)
    for name, tensor in b.items():
        assert torch.equal(a[name], tensor), name
        for attribute in ("dtype", "device", "requires_grad"):
            assert getattr(a[name], attribute) == getattr(tensor, attribute), (name, attribute)
        assert type(a[name]) is type(tensor)
    for (name, module), twin in zip(ours.named_modules(), theirs.modules(), strict=True):
        assert type(module) is type(twin)
        assert module.training == twin.training, name
        assert module.extra_repr() == twin.extra_repr()


def assert_independent(*modules):
    storages = [t.untyped_storage().data_ptr() for m in modules for t in m.state_dict().values()]
    assert len(set(storages)) == len(storages)


@CHANNELS
@FRACTIONS
@pytest.mark.parametrize("shortcut", ["pad", "projection", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_round_trip(in_channels, out_channels, fraction, shortcut, dtype):
    options = {"residual_fraction": fraction, "shortcut": shortcut, "stride": 2, "kernel_size": 5, "branch_scale": 0.3}
    layer = scrambled(rir.RiRLayer(in_channels, out_channels, **options, eps=0.1, momentum=None, dtype=dtype))
    layer.bn.num_batches_tracked.fill_(7)
    ref = layer.to_reference()
    assert type(ref) is reference.RiRLayer
    back = rir.RiRLayer.from_reference(ref)
    assert_same_state(back, layer)
    assert_same_state(back.to_reference(), ref)
    assert_independent(layer, ref, back)

    blocks = [getattr(ref, f"conv_{name}") for name in ("rr", "rt", "tr", "tt")]
    assert torch.equal(pack_weight(*(None if b is None else b.weight for b in blocks)), layer.weight)
    norms = [bn for bn in (ref.bn_r, ref.bn_t) if bn is not None]
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(torch.cat([getattr(bn, name) for bn in norms]), getattr(layer.bn, name))
    for bn in norms:
        assert (bn.eps, bn.momentum, int(bn.num_batches_tracked)) == (0.1, None, 7)
        assert bn.num_features == len(bn.weight)


@FRACTIONS
@pytest.mark.parametrize("outer_shortcut", ["pre_norm", "post_act", "none"])
@pytest.mark.parametrize("outer_streams", ["residual", "both"])
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_block_round_trip(fraction, outer_shortcut, outer_streams, shortcut):
    block = scrambled(
        rir.RiRBlock(
            4, 9, num_layers=3, stride=2, outer_shortcut=outer_shortcut, outer_streams=outer_streams,
            residual_fraction=fraction, shortcut=shortcut, kernel_size=1,
        )
    )  # fmt: skip
    ref = block.to_reference()
    assert type(ref) is reference.RiRBlock
    back = rir.RiRBlock.from_reference(ref, impl="reference")
    assert [layer.impl for layer in back.layers] == ["reference"] * 3
    for layer in back.layers:
        layer.impl = "auto"
    assert_same_state(back, block)
    assert_same_state(back.to_reference(), ref)
    assert_independent(block, ref, back)
    assert vars(back).keys() == vars(block).keys()
    assert all(vars(back)[name] == value for name, value in vars(block).items() if not name.startswith("_"))


@pytest.mark.parametrize("convert", [rir.RiRLayer.to_reference, lambda layer: copy.deepcopy(layer.to_reference())])
def test_modes_and_requires_grad_are_kept(convert):
    layer = rir.RiRLayer(4, 6, stride=2, shortcut="projection")
    layer.weight.requires_grad_(False)
    layer.bn.bias.requires_grad_(False)
    layer.projection.requires_grad_(False)
    layer.bn.eval()  # frozen within a layer in training mode
    ref = convert(layer)
    assert ref.training and not ref.bn_r.training and not ref.bn_t.training
    assert [name for name, p in ref.named_parameters() if p.requires_grad] == ["bn_r.weight", "bn_t.weight"]
    assert_same_state(rir.RiRLayer.from_reference(ref), layer)
    layer.eval()
    assert not layer.to_reference().training
    assert_same_state(rir.RiRLayer.from_reference(layer.to_reference()), layer)
    assert not rir.RiRBlock(4, 4).eval().to_reference().training


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_norms_without_parameters_or_statistics(options):
    layer = rir.RiRLayer(4, 6)
    layer.bn = nn.BatchNorm2d(6, **options)
    assert_same_state(rir.RiRLayer.from_reference(layer.to_reference()), layer)


def test_the_device_is_kept():
    ref = rir.RiRBlock(4, 6, device="meta").to_reference()
    assert {t.device.type for t in ref.state_dict().values()} == {"meta"}
    back = rir.RiRBlock.from_reference(ref)
    assert {t.device.type for t in back.state_dict().values()} == {"meta"}


def test_no_random_number_is_drawn():
    block = rir.RiRBlock(4, 6, stride=2, shortcut="projection")
    state = torch.get_rng_state()
    rir.RiRBlock.from_reference(block.to_reference())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ref: setattr(ref.bn_t, "eps", 0.5), "eps of the norms must agree"),
        (lambda ref: setattr(ref.bn_t, "momentum", None), "momentum of the norms must agree"),
        (lambda ref: ref.bn_t.eval(), "training of the norms must agree"),
        (lambda ref: ref.bn_t.num_batches_tracked.add_(1), "num_batches_tracked of the norms must agree"),
        (lambda ref: ref.bn_t.bias.requires_grad_(False), "bias of the norms must agree"),
        (lambda ref: setattr(ref, "bn_t", nn.BatchNorm2d(3, affine=False)), "weight of the norms must agree"),
        (lambda ref: ref.conv_tt.weight.requires_grad_(False), "requires_grad of the four convolutions must agree"),
    ],
)
def test_what_cannot_be_packed_is_refused(change, message):
    ref = reference.RiRLayer(4, 6)
    change(ref)
    with pytest.raises(ValueError, match=message):
        rir.RiRLayer.from_reference(ref)
