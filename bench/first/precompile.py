"""Every kernel that the other steps launch is compiled into Triton's cache, on all cores: compiling needs no GPU.

Compiled one after the other, as launches come, they would take most of the time that there is.
"""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rir_kernels.triton.inspect import compile_for_real, compile_ops
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS

from . import units
from .exactness import SHAPES
from .networks import NETWORKS


def run(journal, machine, _seconds):
    journal.take("Triton's cache", _cache)
    jobs = _jobs(machine)
    todo = {name: job for name, job in jobs.items() if name not in journal.items}
    workers = min(len(todo), os.cpu_count() or 1)
    with ProcessPoolExecutor(max(1, workers), get_context("spawn"), initializer=compile_for_real) as pool:
        futures = {name: pool.submit(function, *arguments) for name, (function, *arguments) in todo.items()}
        for name, future in futures.items():
            journal.take(name, future.result)


def _jobs(machine):
    """{name: (function, *arguments)}, the ones that take longest first."""
    if machine.dry:
        return {"a norm": (_compile_unit, units.NORM, machine.dtype, machine.arch)}
    shapes = dict.fromkeys((*SHAPE_TABLE, *TRANSITIONS, *SHAPES))
    jobs = {f"{s.name} x{s.batch}": (_compile_shape, s, machine.dtype, machine.arch) for s in shapes}
    for network in NETWORKS:
        if (module := network.fused(machine)) is not None:
            found = units.of_network(module, (machine.batch, 3, network.size, network.size), machine.dtype)
            jobs |= {f"{network.name} {unit}": (_compile_unit, unit, machine.dtype, machine.arch) for unit in found}
    return jobs


def _cache():
    """What Triton's cache depends on besides the kernels: a hash of Triton itself, and its assembler's version."""
    from triton import knobs
    from triton.runtime.cache import triton_key

    return {"key": hashlib.sha256(triton_key().encode()).hexdigest(), "ptxas": knobs.nvidia.ptxas.version}


def _compile_shape(shape, dtype, arch):
    return {"kernels": len({compiled.hash for *_, compiled in compile_ops(shape, dtype, arch)})}


def _compile_unit(unit, dtype, arch):
    return {"kernels": units.compile_unit(unit, dtype, arch)}
