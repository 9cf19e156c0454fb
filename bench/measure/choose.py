"""What "auto" should choose: the faster of ours, layer by layer, from results; `rir_kernels.dispatch.choices` reads it.

A RiR layer's rows decide, in CUDA graphs with a warm cache, inference by "eval" and training by "step", at the largest
batch that was measured. A difference within the noise is none: the kernels are chosen then.
"""

from collections.abc import Sequence
from pathlib import Path

from bench.cases.selection import named_shape
from bench.report.speedup import Alternatives, cases
from bench.schema import DTYPES, Results
from rir_kernels.common.arguments import OUR_KERNELS
from rir_kernels.common.device_tables import slug
from rir_kernels.dispatch.choices import FOLDER, SCHEMA
from tooling.files import save_json

NOISE = 0.02
MODES = {"eval": False, "step": True}


def choose(results: Sequence[Results], folder: Path = FOLDER) -> Path:
    """Writes `folder`/<device>.json; ValueError where the results are of several devices, or of none with a choice."""
    names = {result.device["name"] for result in results}
    if len(names) != 1:
        raise ValueError(f"expected results of one device, got {', '.join(sorted(names)) or 'none'}")
    found = [case for case in cases(row for result in results for row in result.rows) if _decides(case)]
    largest = {}
    for case in sorted(found, key=lambda case: case.batch):
        largest[case.shape, case.dtype, case.mode] = case
    if not largest:
        raise ValueError(f"no RiR layer has graph times of both {' and '.join(OUR_KERNELS)}: run `bench layers` first")
    path = Path(folder) / f"{slug(names.pop())}.json"
    return save_json(path, {"schema": SCHEMA, "choices": [_entry(case) for case in largest.values()]})


def _decides(case: Alternatives) -> bool:
    is_layer = (case.suite, case.op) == ("layers", "rir_layer") and case.mode in MODES
    return is_layer and all(case.time(impl, True) for impl in OUR_KERNELS)


def _entry(case):
    shape = named_shape(case.shape)
    kernels, vendor = case.time("triton", True), case.time("hybrid", True)
    return {
        "c_in": shape.c_in,
        "c_out": shape.c_out,
        "kernel": shape.kernel,
        "stride": shape.stride,
        "rows": shape.size,
        "dtype": f"torch.{DTYPES[case.dtype]}",
        "training": MODES[case.mode],
        "impl": "hybrid" if vendor < (1 - NOISE) * kernels else "triton",
    }
