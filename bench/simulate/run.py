"""From the names on the command line to the table and the file."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.report.speedup import geometric_mean
from bench.simulate.machine import BASE, OPTIMISTIC, PESSIMISTIC
from bench.simulate.rows import row_of
from bench.simulate.workers import each
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling.tile import ConvConfig
from tooling import console, provenance
from tooling.files import now, save_json

KIND, SCHEMA = "simulated", 1
_HEADER = ["", "CTAs", "waves", "start", "loop", "end", "tensor", "us (range)", "floor", "ratio"]


def run(
    shapes: Sequence[Shape], ops: Sequence[str], dtype: str, *, tile: ConvConfig | None, explain: bool,
    out: Path | None, command: Sequence[str],
) -> bool:  # fmt: skip
    """Simulates and prints them, leaves `out`/simulated.json where a folder is given; whether every row came out.

    ValueError without Triton.
    """
    jobs = {f"{shape.name} x{shape.batch} {op}": (shape, op, dtype, tile) for op in ops for shape in shapes}
    rows = list(each(row_of, jobs, "simulate").values())
    explained = [row.pop("explained", []) for row in rows]
    for op in ops:
        of_op = [row for row in rows if row["op"] == op]
        good = [row for row in of_op if "error" not in row]
        if good:
            console.table(_HEADER, list(map(_cells, good)), title=f"{op}, {dtype}: simulated us")
            us, ratio = (
                geometric_mean([row[f"simulated_{name}"] for row in good]) for name in ("us", "ratio_to_floor")
            )
            console.say(f"geometric means, simulated: {us:.1f} us, {ratio:.2f} times the floor\n")
        for row in of_op:
            if "error" in row:
                console.say(f"{row['shape']} x{row['batch']} {op}: {row['error']}")
    for row, lines in zip(rows, explained, strict=True):
        if explain and lines:
            console.say("\n".join([f"\n{row['shape']} x{row['batch']} {row['op']}: {row['tile']}", *lines]))
    console.say(
        "All of this is simulated, nothing was measured. start, loop, end: thousands of clocks of a CTA before, in and "
        "after its main loop; tensor: share of all clocks in which products run; range: optimistic to pessimistic "
        f"constants; floor: {BASE.tensor_tflops:.0f} TFLOP/s or {BASE.hbm_gbps / 1e3} TB/s, computed."
    )
    if out is not None:
        console.say(f"wrote {save_json(out / 'simulated.json', _file(rows, command))}")
    return not any("error" in row for row in rows)


def _cells(row):
    least, most = row["simulated_us_optimistic"], row["simulated_us_pessimistic"]
    return [
        row["shape"], str(row["ctas_per_sm"]), str(row["waves"]),
        *(f"{clocks / 1e3:.1f}" for clocks in row["simulated_clocks"].values()),
        f"{row['simulated_tensor_share']:.0%}", f"{row['simulated_us']:.1f} ({least:.0f}-{most:.0f})",
        f"{row['computed_floor_us']:.1f}", f"{row['simulated_ratio_to_floor']:.2f}",
    ]  # fmt: skip


def _file(rows, command):
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "simulated": True,
        "created": now(),
        "command": shlex.join(["python", "-m", "bench", *command]),
        **provenance.of_a_run(torch.device("cpu"), KIND),
        "device": {"name": "none", "type": "simulated", "stands_for": "H200"},
        "constants": {
            "base": dataclasses.asdict(BASE),
            "optimistic": dataclasses.asdict(OPTIMISTIC),
            "pessimistic": dataclasses.asdict(PESSIMISTIC),
        },
        "rows": rows,
    }
