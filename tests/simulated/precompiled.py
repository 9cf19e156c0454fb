"""Which kernels a training step still has to compile after its units were compiled ahead: their names, as JSON.

    python tests/simulated/precompiled.py FOLDER

TRITON_CACHE_DIR is FOLDER's own, and empty at the start.
"""

import copy
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import rir_kernels as rir
from bench.first import units
from bench.modules import prepared
from bench.networks import BasicBlock, Bottleneck
from rir_kernels.triton.inspect import compile_for_real

SHAPE = 2, 16, 8, 8


def main():
    folder = Path(sys.argv[1])
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    model = torch.nn.Sequential(BasicBlock(16, 16), Bottleneck(16, 16, stride=2))
    for layer in model.modules():
        if isinstance(layer, rir.ConvBNAct):
            layer.impl = "triton"
    found = units.of_network(copy.deepcopy(model), SHAPE, torch.bfloat16)
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=compile_for_real) as pool:
        counts = list(pool.map(units.compile_unit, found, [torch.bfloat16] * len(found), ["sm_90"] * len(found)))

    import driver
    from triton import knobs

    from rir_kernels import dispatch

    driver.activate(folder)
    dispatch._require_kernels = lambda impl, x: None  # the tensors are a CPU's
    missed = []
    knobs.compilation.listener = lambda **seen: seen["cache_hit"] or missed.append(seen["src"].name)
    model = prepared(model, torch.bfloat16, torch.device("cpu")).train()
    images = torch.zeros(SHAPE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        y = model(images)
        y.backward(torch.ones_like(y))
    json.dump({"units": len(found), "compiled": sum(counts), "missed": missed}, sys.stdout)


if __name__ == "__main__":
    main()
