"""The peers are the same function: their forms against the naive layers, in fp64, where nothing hides."""

import pytest
import torch
from torch import nn

import rir_kernels as rir
from bench import peers
from bench.cases.modules import prepared
from bench.cases.networks import BasicBlock, Bottleneck
from models import RiR
from tests.support.helpers import (
    double_precision,  # noqa: F401
    module_results,
)

LAYERS = {
    "layer": lambda: rir.RiRLayer(6, 6),
    "stride": lambda: rir.RiRLayer(4, 7, stride=2),
    "projection": lambda: rir.RiRLayer(4, 6, stride=2, shortcut="projection"),
    "none": lambda: rir.RiRLayer(4, 6, shortcut="none", branch_scale=0.5),
    "one stream": lambda: rir.RiRLayer(4, 6, residual_fraction=1.0),
    "block": lambda: rir.RiRBlock(4, 8, stride=2, outer_shortcut="pre_norm"),
    "both streams": lambda: rir.RiRBlock(4, 4, outer_streams="both", outer_shortcut="post_act"),
    "unit": lambda: rir.ConvBNAct(4, 6, 3, activation=None, bias=True, branch_scale=0.5),
    "basic block": lambda: BasicBlock(4, 6, 2),
    "bottleneck": lambda: Bottleneck(8, 2),
    "network": lambda: RiR(num_classes=3, width=(4, 6, 8), depth=(1, 1, 1)),
}


def results(module, x):
    return module_results(module, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_forms_agree(name, training):
    module = prepared(LAYERS[name](), torch.float64, torch.device("cpu")).double()
    channels = next(p for p in module.parameters() if p.dim() == 4).shape[1]
    x = torch.randn(3, channels, 8, 8)
    found = {}
    for impl in ("reference", "merged", "torch"):
        variant = peers.build(impl, module, x, training=training)
        assert variant.training == training
        found[impl] = module_results(variant, x)
    for impl in ("merged", "torch"):
        for key, value in found["reference"].items():
            # fp64: a few thousand roundings of 1e-16
            torch.testing.assert_close(
                found[impl][key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_residual_before_the_norm():
    unit = prepared(rir.ConvBNAct(4, 6, 3, residual_at="pre_norm"), torch.float64, torch.device("cpu")).double()
    x, residual = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)
    expected = peers.build("reference", unit, x, training=True)(x, residual)
    torch.testing.assert_close(peers.build("merged", unit, x, training=True)(x, residual), expected)


def test_forms_are_copies_and_are_what_they_say():
    module = nn.Sequential(rir.RiRLayer(4, 4), rir.ConvBNAct(4, 4, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(2, 4, 5, 5)
    for impl in ("reference", "merged", "torch", "auto"):
        variant = peers.build(impl, module, x, training=True)
        variant(x)
        assert not {p.data_ptr() for p in variant.parameters()} & {p.data_ptr() for p in module.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    reference = peers.build("reference", module, x, training=False)
    assert [type(layer) for layer in reference] == [rir.reference.RiRLayer, rir.reference.ConvBNAct]
    assert not reference.training
    assert [layer.impl for layer in peers.with_impl(module, "hybrid")] == ["hybrid", "hybrid"]


def test_absent_peers_say_why():
    device = torch.device("cpu")
    for impl in ("hybrid", "triton", "cudnn", "tensorrt"):
        assert len(peers.absent(impl, device).splitlines()) == 1
    for impl in ("reference", "merged", "compile", "compile_max_autotune", "torch", "auto"):
        assert peers.absent(impl, device) is None


def test_compiled_for_one_shape_and_frozen_for_inference():
    options = peers.compiled.options("compile_max_autotune", training=False)
    assert options["max_autotune"] and options["freezing"]
    assert not options.get("triton.cudagraphs")  # graphs are the timer's, for every alternative alike
    assert "freezing" not in peers.compiled.options("compile", training=True)
