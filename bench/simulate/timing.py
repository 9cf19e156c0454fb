"""From one multiprocessor to a launch: turns of CTAs, the clock under load."""

from collections import Counter
from dataclasses import dataclass

from .decoded import PHASES
from .machine import Machine
from .multiprocessor import Run, simulate
from .state import Kernel

TURNS = 3  # of CTAs that are simulated; more go on at the pace of the last


@dataclass(frozen=True)
class Turns:
    """How a launch's CTAs come to the busiest multiprocessor."""

    each: int  # CTAs of it
    together: int  # of them at a time
    waves: int

    @classmethod
    def of(cls, programs: int, residents: int, machine: Machine) -> "Turns":
        each = -(-programs // machine.sms)
        together = min(residents, each)
        return cls(each, together, -(-each // together))


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
    turns = Turns.of(kernel.programs, residents, machine)
    kept = min(turns.waves, TURNS)

    def run(together, waves, sm=machine.sms // 2):
        """CTAs of an SM in the middle, or of another, spread over its whole list."""
        order = [number * turns.each // (kept * turns.together) for number in range(together * waves)]
        places = [min(sm + machine.sms * number, kernel.programs - 1) for number in order]
        return simulate(kernel, machine, [places[slot::together] for slot in range(together)])

    full = run(turns.together, kept)
    if turns.each == 1:  # a persistent kernel, perhaps: its first CTA has the most tiles
        full = max(full, run(1, 1, sm=0), key=lambda result: result.clocks)
    clocks, tensor, written = _figures(full)
    changes = []  # further turns, and the last one where it is not full
    if turns.waves > kept:
        changes.append((turns.waves - kept, full, run(turns.together, kept - 1)))
    if rest := turns.each % turns.together:
        changes.append((1, run(rest, 1), run(turns.together, 1)))
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
        us, clocks, tensor / clocks, ghz, turns.waves, residents, phases, causes, counts,
        full.loop_tensor / len(full.ctas),
    )  # fmt: skip


def _figures(run: Run):
    return run.clocks, run.tensor, run.written


def _mean(counters):
    total = Counter()
    for counter in counters:
        total.update({key: value / len(counters) for key, value in counter.items()})
    return dict(total)
