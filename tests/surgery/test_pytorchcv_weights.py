"""pytorchcv's rir_cifar10 and our ResNet Init are the same network: weights convert both ways, outputs agree."""

import pytest
import torch

import models
from models.rir import THIN
from tests.support.helpers import scrambled

rir_cifar = pytest.importorskip("pytorchcv.models.rir_cifar")


def thin_of_theirs(num_classes=10):
    """A thin network of pytorchcv's in fp64 with randomized norms."""
    torch.manual_seed(0)
    net = rir_cifar.CIFARRiR(
        [[8] * 4, [16] * 6, [32] * 6], init_block_channels=8, final_block_channels=64, num_classes=num_classes
    ).double()
    for module in scrambled(net).modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked.fill_(7)
    return net


def thin_of_ours(**options):
    torch.manual_seed(1)
    return models.create("resnet_init18_thin", shortcut="projection", dtype=torch.float64, **options)


def same_bits(first, second):
    torch.testing.assert_close(dict(first), dict(second), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "classes", "expected"),
    [(rir_cifar.rir_cifar10, 10, 9_492_980), (rir_cifar.rir_cifar100, 100, 9_527_720)],
    ids=["rir_cifar10", "rir_cifar100"],
)
def test_the_wide_network(make, classes, expected):
    theirs = make().state_dict()
    ours = models.create("resnet_init18_wide", classes, shortcut="projection")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in make().parameters()) == expected
    converted = models.from_pytorchcv(theirs)
    ours.load_state_dict(converted)
    same_bits(ours.state_dict(), converted)
    same_bits(models.to_pytorchcv(converted), theirs)


@pytest.mark.parametrize("size", [(32, 32), (33, 29)])
def test_outputs_agree(size):
    theirs, ours = thin_of_theirs(), thin_of_ours()
    ours.load_state_dict(models.from_pytorchcv(theirs.state_dict()))
    theirs.output.final_pool = torch.nn.AdaptiveAvgPool2d(1)  # theirs pools 8x8 windows, the same only at 32x32
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    for training in (False, True):
        expected = theirs.train(training)(x)
        # fp64 through 18 norms: each may enlarge a rounding error of 1e-16 a few times; a wrong wire is above 1e-3
        torch.testing.assert_close(ours.train(training)(x), expected.flatten(1), rtol=1e-8, atol=1e-8)


def test_a_trained_network_of_ours_runs_as_theirs():
    theirs, ours = thin_of_theirs(), thin_of_ours()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    ours(x)  # statistics of a step
    theirs.load_state_dict(models.to_pytorchcv(ours.state_dict()))
    # tolerance: see test_outputs_agree
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), rtol=1e-8, atol=1e-8)


def test_round_trips():
    theirs = thin_of_theirs(num_classes=7).state_dict()
    same_bits(models.to_pytorchcv(models.from_pytorchcv(theirs)), theirs)
    ours = thin_of_ours(num_classes=7).state_dict()
    same_bits(models.from_pytorchcv(models.to_pytorchcv(ours)), ours)


@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
def test_to_pytorchcv_takes_blocks_of_any_length(layers_per_block):
    net = models.RiR(3, outer_shortcut=False, shortcut="projection", width=THIN, layers_per_block=layers_per_block)
    layers = [layer for block in net.blocks() for layer in block.layers]
    theirs = models.to_pytorchcv(net.state_dict())
    units = [theirs[name] for name in theirs if name.endswith("res_pass_conv.weight")]
    for layer, weight in zip(layers, units, strict=True):
        assert torch.equal(layer.weight[: layer.out_residual, : layer.in_residual], weight)
    assert f"features.stage3.unit{3 * layers_per_block}.res_pass_conv.weight" in theirs


@pytest.mark.parametrize("direction", ["from_pytorchcv", "to_pytorchcv"])
def test_copies_are_independent(direction):
    net = thin_of_theirs() if direction == "from_pytorchcv" else thin_of_ours()
    given = net.state_dict(keep_vars=True)
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    found = getattr(models, direction)(given)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert all(tensor.is_contiguous() for tensor in found.values())
    own = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(own) == len(found)
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    for tensor in found.values():
        tensor.zero_()
    same_bits({name: tensor.detach() for name, tensor in given.items()}, before)


def without(name):
    return lambda state: state.pop(name)


def replaced(name, change):
    return lambda state: state.update({name: change(state[name])})


UNIT = "features.stage2.unit3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{UNIT}.res_pass_conv.weight"), f"missing {UNIT}.res_pass_conv.weight, unexpected none"),
        (without("features.stage2.unit1.res_pass_conv.weight"), "needs a convolution's weight 'features.stage2.unit1"),
        (without("output.final_conv.conv.weight"), "needs a convolution's weight 'output.final_conv.conv.weight'"),
        (lambda state: state.update(extra=torch.zeros(1)), "missing none, unexpected extra"),
        (replaced(f"{UNIT}.res_pass_conv.weight", lambda w: w[:, 1:]), rf"{UNIT}.res_pass_conv.weight must have the "
         r"shape \(16, 16, 3, 3\), got \(16, 15, 3, 3\)"),
        (replaced("output.final_conv.bn.bias", lambda b: b[1:]), r"final_conv.bn.bias must have the shape \(10,\)"),
        (replaced(f"{UNIT}.trans_postactiv.bn.bias", lambda b: b.float()), "bn.bias is one tensor here, but came as"),
        (replaced(f"{UNIT}.trans_postactiv.bn.num_batches_tracked", lambda n: n + 1), r"the streams have \[7, 8\]"),
        (lambda state: [state.pop(name) for name in list(state) if ".unit2." in name], "without gaps"),
        (lambda state: [state.pop(name) for name in list(state) if "stage3.unit6." in name], r"even .* \[4, 6, 5\]"),
        (lambda state: state.clear(), "without gaps"),
    ],
)  # fmt: skip
def test_what_is_refused_of_theirs(change, message):
    state = dict(thin_of_theirs().state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        models.from_pytorchcv(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "pad"}, "missing stages.1.0.layers.0.projection.weight, stages.2.0.layers.0.projection.weight"),
        ({"outer_shortcut": True}, "unexpected stages.1.0.projection.weight"),
        (
            {"inner_shortcut": False, "outer_shortcut": True},
            "needs a convolution's weight 'stages.0.0.layers.0.weight', got none",
        ),
        ({"head": "linear"}, "needs a convolution's weight 'head.conv.weight', got none"),
        ({"layers": models.rir.rir_kernels.reference}, "needs a convolution's weight 'stages.0.0.layers.0.weight'"),
        ({"width": (7, 8, 10)}, "streams are equally wide"),
    ],
)
def test_what_is_refused_of_ours(options, message):
    net = models.RiR(**({"outer_shortcut": False, "shortcut": "projection", "width": THIN} | options))
    with pytest.raises(ValueError, match=message):
        models.to_pytorchcv(net.state_dict())


@pytest.mark.parametrize("convert", [models.from_pytorchcv, models.to_pytorchcv])
def test_only_state_dicts_are_converted(convert):
    with pytest.raises(TypeError, match=r"expected a state dict, got Linear.*state_dict\(\)"):
        convert(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="holds tensors, got something else for state_dict"):
        convert({"state_dict": {}})
