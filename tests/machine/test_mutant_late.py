"""Late timing changes no bit: what is asynchronous is waited for, in kernels that store by TMA and read more after."""

import pytest
import torch

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.launch import batchnorm, conv
from rir_kernels.triton.tiling.conv_tiles import use_tile
from rir_kernels.triton.tiling.tile import ConvConfig
from tests.kernels.targets import rand
from tests.support import emulation

pytestmark = pytest.mark.machine
BFLOAT16 = torch.device("cpu"), torch.bfloat16
TILE = ConvConfig((1, 4, 4), block_c=64, block_k=16, num_warps=4, num_stages=2)


def _assert_same_bits_when_late(function):
    expected = function()
    before = len(emulation.emulator.records)
    with emulation.emulator.late():
        found = function()
    records = emulation.emulator.records[before:]
    assert records and [text for record in records for text in record.reports if not text.startswith("note: ")] == []
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_inference_that_saves_z(poisoned):
    x, weight = rand((1, 8, 4, 4), BFLOAT16, seed=1), rand((8, 8, 3, 3), BFLOAT16, seed=2)
    norm = {name: torch.linspace(0.5, 2.0, 8) for name in ("mean", "var", "gamma", "beta")}
    spec = ConvBNActSpec(padding=(1, 1))
    with use_tile(TILE):
        _assert_same_bits_when_late(
            lambda: conv.conv_infer(x, weight, bias=None, residuals=(), spec=spec, **norm, save_z=True)
        )


def test_gradient_beside_the_sums_of_the_layer_upstream(poisoned):
    z, weight = rand((1, 8, 4, 4), BFLOAT16, seed=1), rand((8, 8, 3, 3), BFLOAT16, seed=2)
    upstream = batchnorm.Upstream(z, *[torch.linspace(0.5, 2.0, 8)] * 4, relu=True)
    spec = ConvBNActSpec(padding=(1, 1))
    with use_tile(TILE):
        _assert_same_bits_when_late(
            lambda: conv.conv_data_grad(z, weight, shape=tuple(z.shape), spec=spec, upstream=upstream)
        )
