"""From one multiprocessor to a launch: turns of CTAs, the clock under load."""

from collections import Counter
from dataclasses import dataclass

from bench.simulate.decoded import PHASES
from bench.simulate.machine import Machine
from bench.simulate.multiprocessor import Run, simulate
from bench.simulate.state import Kernel

TURNS = 3  # of CTAs that are simulated; more go on at the pace of the last


@dataclass
class Time:
    """Simulated."""

    us: float
    clocks: float
    tensor: float  # share of the clocks
    ghz: float
    waves: int
    residents: int
    phases: dict[str, float]  # clocks of a CTA
    causes: dict[tuple[int, str], float]  # clocks of a CTA's first warp group
    counts: dict[tuple[int, str], float]  # of its instructions
    loop_tensor: float  # clocks of tensor cores in a CTA's main loop


def time_of(kernel: Kernel, machine: Machine, partial_bytes: float = 0.0) -> Time:
    """Of the kernel, and of the launch that adds up so many bytes of its partial sums. CannotModel as `simulate`."""
    residents = kernel.residents(machine)
    each = -(-kernel.programs // machine.sms)  # CTAs of the busiest SM, so many of them at a time, in so many waves
    together = min(residents, each)
    waves = -(-each // together)
    kept = min(waves, TURNS)

    def run(slots, turns, sm=machine.sms // 2):
        """CTAs of an SM in the middle, or of another, spread over its whole list."""
        order = [number * each // (kept * together) for number in range(slots * turns)]
        places = [min(sm + machine.sms * number, kernel.programs - 1) for number in order]
        return simulate(kernel, machine, [places[slot::slots] for slot in range(slots)])

    full = run(together, kept)
    if each == 1:  # a persistent kernel, perhaps: its first CTA has the most tiles
        full = max(full, run(1, 1, sm=0), key=lambda result: result.clocks)
    clocks, tensor, written = _figures(full)
    changes = []  # further turns, and the last one where it is not full
    if waves > kept:
        changes.append((waves - kept, full, run(together, kept - 1)))
    if rest := each % together:
        changes.append((1, run(rest, 1), run(together, 1)))
    for times, more, less in changes:
        for_clocks, for_tensor, for_written = (
            times * (a - b) for a, b in zip(_figures(more), _figures(less), strict=True)
        )
        clocks, tensor, written = clocks + for_clocks, tensor + for_tensor, written + for_written
    ghz = machine.clock_at(min(0.95, tensor / clocks))
    # half of the pointer stores hides behind other work
    us = (clocks + 0.5 * written / machine.partial_rate) / ghz / 1e3 + machine.kernel_us
    if partial_bytes:
        us += machine.reduction_us + partial_bytes / machine.hbm_gbps / 1e3
    causes, counts = (_mean([getattr(cta, name) for cta in full.ctas]) for name in ("spent", "counts"))
    phases = {name: sum(v for (phase, _), v in causes.items() if PHASES[phase] == name) for name in PHASES}
    return Time(
        us, clocks, tensor / clocks, ghz, waves, residents, phases, causes, counts,
        full.loop_tensor / len(full.ctas),
    )  # fmt: skip


def _figures(run: Run):
    return run.clocks, run.tensor, run.written


def _mean(counters):
    total = Counter()
    for counter in counters:
        total.update({key: value / len(counters) for key, value in counter.items()})
    return dict(total)
