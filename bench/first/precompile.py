"""Every kernel that the other steps launch is compiled into Triton's cache, on all cores: compiling needs no GPU.

Compiled one after the other, as launches come, they would take most of the time that there is.
"""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import nn

import rir_kernels as rir
from bench.cases.modules import prepared
from bench.first.exactness import SHAPES
from bench.first.networks import NETWORKS
from rir_kernels.triton.inspect import compile_for_real, compile_ops
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS


def run(journal, machine, _seconds):
    journal.take("Triton's cache", _cache)
    shapes = () if machine.dry else dict.fromkeys((*SHAPE_TABLE, *TRANSITIONS, *SHAPES))
    networks = ("a norm",) if machine.dry else tuple(network.name for network in NETWORKS)
    _all(
        journal, {f"{shape.name} x{shape.batch}": (_compile_shape, shape, machine) for shape in shapes}, os.cpu_count()
    )
    # each of them on all cores
    _all(journal, {f"{network} x{machine.batch}": (_compile_network, network, machine) for network in networks}, 1)


def _all(journal, jobs, workers):
    """{name: (function, *arguments)}, in processes that do not interpret kernels."""
    todo = {name: job for name, job in jobs.items() if name not in journal.items}
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=compile_for_real) as pool:
        futures = {name: pool.submit(function, *arguments) for name, (function, *arguments) in todo.items()}
        for name, future in futures.items():
            journal.take(name, future.result)


def _cache():
    """What Triton's cache depends on besides the kernels: a hash of Triton itself, and its assembler's version."""
    from triton import knobs
    from triton.runtime.cache import triton_key

    return {"key": hashlib.sha256(triton_key().encode()).hexdigest(), "ptxas": knobs.nvidia.ptxas.version}


def _compile_shape(shape, machine):
    return {"kernels": len({compiled.hash for *_, compiled in compile_ops(shape, machine.dtype, machine.arch)})}


def _compile_network(name, machine):
    """A training step's kernels; none where the network's library is not installed."""
    if machine.dry:
        module, size = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), 8
        rir.fuse_(module, impl="triton")
    else:
        network = next(network for network in NETWORKS if network.name == name)
        module, size = network.fused(machine), network.size
    if module is None:
        return {"kernels": 0}
    module = prepared(module, machine.dtype, torch.device("meta"))
    images = torch.empty(machine.batch, 3, size, size, dtype=machine.dtype, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    return {"kernels": rir.precompile(module, images, arch=machine.arch).kernels}
