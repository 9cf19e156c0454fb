"""The kernels of a training step at several batches, by Triton's own cache keys, as JSON; nothing is compiled.

    python tests/support/simulated/batches.py BATCH...

For each network, and each batch: how many kernels there are, how many of them the first batch does not have, and how
many of all launches' jobs are different ones.
"""

import json
import sys

import torch
from triton import knobs
from triton.runtime.driver import driver

from bench.cases.modules import prepared
from bench.first.machine import Machine
from bench.first.networks import NETWORKS
from rir_kernels import precompiling
from rir_kernels.triton.inspect import _CompileOnlyDriver
from rir_kernels.triton.tiling.gpus import typical_gpu


def main():
    driver.set_active(_CompileOnlyDriver("sm_90"))
    found = {network.name: _of(network, [int(batch) for batch in sys.argv[1:]]) for network in NETWORKS}
    json.dump({name: counts for name, counts in found.items() if counts}, sys.stdout)


def _of(network, batches):
    module = network.fused(Machine(impl="auto"))
    if module is None:
        return None
    module = prepared(module, torch.bfloat16, torch.device("meta"))
    images = torch.empty(1, 3, network.size, network.size, dtype=torch.bfloat16, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    counts, first = {}, None
    for batch in batches:
        jobs = set(precompiling.launches(module, (images,), batch, True, typical_gpu(90)))
        keys = _keys(jobs)
        first = first or keys
        counts[batch] = {"kernels": len(keys), "new": len(keys - first), "jobs": len(jobs)}
    return counts


def _keys(jobs):
    keys = set()

    def note(*, key, fn, **_):
        keys.add((fn.name, key))
        return True  # and Triton goes no further

    knobs.runtime.jit_cache_hook = note
    for job in jobs:
        job.compile()
    return keys


if __name__ == "__main__":
    main()
