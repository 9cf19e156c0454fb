"""rir.precompile, and what a training step and an inference still compile after it, as JSON.

    python tests/support/simulated/precompiled.py FOLDER

TRITON_CACHE_DIR is FOLDER's own, and empty at the start. Both reports, of the first call and of a second one, and the
names of kernels that were compiled by the steps.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

import rir_kernels as rir

SHAPE = 2, 8, 8, 8


def main():
    folder = Path(sys.argv[1])
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 1),
    )
    rir.fuse_(model, impl="triton")
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    images = torch.zeros(SHAPE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reports = [rir.precompile(model, images, training=mode, workers=2, arch="sm_90") for mode in (True, False, True)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    import stand_in
    from triton import knobs

    stand_in.activate()
    missed = []
    knobs.compilation.listener = lambda **seen: seen["cache_hit"] or missed.append(seen["src"].name)
    for _ in range(2):
        y = model.train()(images)
        y.backward(torch.ones_like(y))
    with torch.no_grad():
        model.eval()(images)
    json.dump({"reports": [dataclasses.asdict(report) for report in reports], "missed": missed}, sys.stdout)


if __name__ == "__main__":
    main()
