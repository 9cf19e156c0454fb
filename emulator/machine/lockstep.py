"""All threads of some programs together: fast, and blind to races."""

import numpy as np

from . import Fault
from .shared import Shared
from .tensor_products import TensorProducts
from .threads import LANES, Launch

MOST_THREADS = 4096  # that run together: more no longer pays in NumPy
MOST_REGISTERS = 50_000_000  # of all these threads: 200 MB


def run(launch: Launch, shared: int) -> None:
    """All programs of a launch whose programs have so many bytes of shared memory."""
    program = launch.kernel.program
    most = min(MOST_THREADS, MOST_REGISTERS // max(1, len(program.registers)))
    slots = max(1, most // program.threads)
    for first in range(0, launch.programs, slots):
        programs = range(first, min(first + slots, launch.programs))
        try:
            with np.errstate(all="ignore"):  # a GPU has no such warnings either
                _run(launch, Shared(len(programs), shared), programs)
        except Fault as fault:
            raise Fault(f"{program.name}, programs {programs.start} to {programs.stop - 1}: {fault}") from fault


def _run(launch, shared, programs):
    threads = TensorProducts(launch, shared, programs, 0, launch.kernel.program.threads // LANES)
    settled = -1
    while True:
        threads.run()
        if threads.has_ended:
            return
        if not released([threads]):
            # as nothing has happened since, those who look again will do so in vain
            if not threads.retry() or settled == shared.settled:
                raise Fault("deadlock: threads wait for each other, or for an mbarrier")
            settled = shared.settled


def released(groups: list) -> bool:
    """Lets warps go on for which all that are expected at their barrier have come; whether there are any."""
    places = [(g, g.slot[::LANES] * 64 + g.barrier) for g in groups]  # 16 barriers a program
    any_released = False
    for place in {int(p) for g, places_of in places for p in places_of[g.barrier >= 0]}:
        there = [(g, (g.barrier >= 0) & (p == place)) for g, p in places]
        expected = np.concatenate([g.expected[warps] for g, warps in there])
        if (expected != expected[0]).any():
            raise Fault(f"barrier {place % 64} is waited at with different numbers of threads")
        if LANES * len(expected) == expected[0]:
            any_released = True
            groups_there = [g for g, warps in there if warps.any()]
            for g in groups_there:
                g.met(groups_there)
            for g, warps in there:
                g.barrier[warps] = -1
    return any_released
