"""The simulated figures of one operation of one layer."""

from collections.abc import Iterator

import torch

from bench.schema import DTYPES
from bench.simulate.decoded import PHASES
from bench.simulate.disassembly import CannotModel
from bench.simulate.machine import BASE, OPTIMISTIC, PESSIMISTIC
from bench.simulate.timing import Time, time_of
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling.tile import ConvConfig

_COUNTED = {
    "barrier": "BAR", "try wait": "TRYWAIT", "load": "TMA loads", "store": "TMA stores", "wgmma": "wgmma",
    "wgmma wait": "waits for wgmma",
}  # fmt: skip


def row_of(shape: Shape, op: str, dtype: str, tile: ConvConfig | None) -> dict:
    """The figures, or the `error` for which there are none. For a process that launches nothing else.

    By the names that README.md in the folder above has; `explained`, lines of text, stays out of the file.
    """
    case = {"shape": shape.name, "op": op, "batch": shape.batch, "dtype": dtype, "simulated": True}
    try:
        return case | _figures(shape, op, dtype, tile)
    except CannotModel as error:
        return case | {"error": f"cannot be modelled: {error}"}
    except Exception as error:  # of this row only: a tile that does not compile, for instance
        return case | {"error": f"{type(error).__name__}: {error}"}


def _figures(shape, op, dtype, tile):
    from bench.simulate.kernels import launched

    launch = launched(shape, op, getattr(torch, DTYPES[dtype]), tile)
    kernel = launch.kernel
    base, best, worst = (time_of(kernel, each, launch.partial_bytes) for each in (BASE, OPTIMISTIC, PESSIMISTIC))
    # a kernel that is understood computes what the layer needs, on the SM that has most to do
    done = BASE.sms * base.tensor * base.clocks * BASE.tensor_flops_per_clock / launch.least_flops
    if done < 0.97:
        raise CannotModel(f"only {done:.0%} of the layer's products were met in the code")
    ceilings = {"matmul_tflops": {dtype: BASE.tensor_tflops}, "copy_gbps": BASE.hbm_gbps}
    floor = 1e3 * launch.needs.floor_ms(ceilings, dtype)
    return {
        "kernel": kernel.name,
        "tile": launch.tile,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared,
        "programs": kernel.programs,
        "ctas_per_sm": base.residents,
        "waves": base.waves,
        "simulated_clocks": {name: round(base.phases[name]) for name in PHASES},
        "simulated_tensor_share": round(base.tensor, 3),
        "simulated_ghz": round(base.ghz, 2),
        "simulated_us": round(base.us, 2),
        "simulated_us_optimistic": round(best.us, 2),
        "simulated_us_pessimistic": round(worst.us, 2),
        "computed_floor_us": round(floor, 2),
        "simulated_ratio_to_floor": round(base.us / floor, 3),
        "explained": list(_explained(base)),
    }


def _explained(time: Time) -> Iterator[str]:
    """Where the clocks of a CTA's first warp group go."""
    for phase, name in enumerate(PHASES):
        if not (total := time.phases[name]):
            continue
        counts = {text: time.counts.get((phase, kind), 0.0) for kind, text in _COUNTED.items()}
        seen = [f"{count:.0f} {text}" for text, count in counts.items() if count]
        yield f"  {name}: {total:.0f} simulated clocks; {', '.join(seen) or 'no waits'}"
        causes = sorted(((v, cause) for (where, cause), v in time.causes.items() if where == phase), reverse=True)
        yield from (f"    {v:8.0f}  {v / total:4.0%}  {cause}" for v, cause in causes if v >= 0.01 * total)
        if name == "loop":
            busy = min(1.0, time.loop_tensor * time.residents / total)
            yield f"    products fill {busy:.0%} of these clocks, those of all CTAs together; the rest are gaps"
