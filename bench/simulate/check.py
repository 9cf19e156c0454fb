"""`python -m bench simulate --check`: does the simulation still match matmuls that others have measured?"""

from bench.simulate.machine import BASE, OPTIMISTIC, PESSIMISTIC
from bench.simulate.workers import each
from tooling import console

# TFLOP/s by K, measured on an H100 by others: "Hopper results" of Triton's python/tutorials/gluon/07-persistence.py,
# 8192 x 8192 x K in 16 bits, tiles of 128 x 256 x 64, 8 warps, 3 buffers: "nonpersistent", and "pipelined", which is
# persistent and loads a tile's operands while the last one ends
PUBLISHED = {
    "plain": {512: 491.7, 1024: 554.2, 2048: 573.9, 4096: 609.4},
    "persistent": {512: 539.9, 1024: 602.5, 2048: 625.9, 4096: 640.5},
}
LIMIT = 1.15  # the constants were calibrated on the plain ones, to about 10 %
CASES = {f"{kind}, K {k}": (kind, k) for kind, figures in PUBLISHED.items() for k in figures}


def simulated(kind: str, k: int) -> tuple[float, float, float]:
    """TFLOP/s of a matmul: as expected, least and most. For a process that launches nothing else."""
    from bench.simulate import matmul
    from bench.simulate.timing import time_of

    kernel = matmul.compiled(kind, k)
    return tuple(
        2 * matmul.SIZE**2 * k / time_of(kernel, machine).us / 1e6 for machine in (BASE, PESSIMISTIC, OPTIMISTIC)
    )


def check() -> bool:
    """Prints the figures; whether every plain matmul is within LIMIT of what is published."""
    rows, good = [], True
    for name, (rate, least, most) in each(simulated, CASES, "simulated matmuls").items():
        kind, k = CASES[name]
        published = PUBLISHED[kind][k]
        ratio = rate / published
        near = 1 / LIMIT <= ratio <= LIMIT
        good &= near or kind != "plain"
        verdict = "shown, not judged" if kind != "plain" else "" if near else f"more than {LIMIT - 1:.0%} off"
        rows.append([name, f"{published:.0f}", f"{rate:.0f} ({least:.0f}-{most:.0f})", f"{ratio:.2f}", verdict])
    console.table(
        ["", "published", "simulated (range)", "ratio", ""],
        rows,
        title="8192 x 8192 x K, bf16, TFLOP/s: measured by others on an H100, and simulated",
    )
    return good
