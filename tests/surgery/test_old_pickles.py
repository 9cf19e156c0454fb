"""Models that version 0.1 fused, folded and pickled load and give the same outputs as then.

`fused_by_0.1.pt` holds three of them in evaluation (one with RiRBlock and ConvBNAct, one folded and fused, one
pre-activation), an input and their outputs on it, by "auto" on a CPU.
"""

from pathlib import Path

import torch

import rir_kernels as rir

SAVED = Path(__file__).with_name("fused_by_0.1.pt")


def test_they_load_and_compute_the_same():
    saved = torch.load(SAVED, weights_only=False)
    for model, expected in zip(saved["models"], saved["y"], strict=True):
        with torch.no_grad():
            # fp32 on other CPUs, whose convolutions sum in other orders
            torch.testing.assert_close(model(saved["x"]), expected, rtol=1e-5, atol=1e-6)
    trained, folded, _ = saved["models"]
    assert [len(rir.fusion_status(model)) for model in (trained, folded)] == [1, 2]
    status = [entry for model in (trained, folded) for entry in rir.fusion_status(model)]
    assert [(entry.pattern, entry.fused) for entry in status] == [
        ("conv_bn_act", True), ("conv_bn_act", True), ("conv_bn", True),
    ]  # fmt: skip
    rir.unfuse_(trained)
    assert len(rir.fusion_status(trained)) == 0
