"""Made-up results: every figure here is computed from a formula, none was measured."""

import hashlib

from bench.schema import Results, Row

SHAPES = {
    "96@32": 55, "192@16": 55, "384@8": 55, "48@32": 14, "16@32": 4, "32@16": 2, "64@8": 1.5, "64@56": 75, "128@28": 75,
    "256@14": 75, "512@7": 75,
}  # fmt: skip
FACTORS = {
    "reference": 4.2, "merged": 1.9, "compile": 1.5, "compile_max_autotune": 1.3, "cudnn": 1.25, "tensorrt": 1.1,
    "torch": 1.8, "hybrid": 1.2, "triton": 1.02, "auto": 1.0,
}  # fmt: skip
KERNELS = {
    "conv_eval": ("eval", 1.0), "conv_train": ("train_fwd", 1.1), "finalize": ("train_fwd", 0.05),
    "normalize": ("train_fwd", 0.4), "reduce": ("bwd", 0.5), "apply": ("bwd", 0.7), "data_grad": ("bwd", 1.1),
    "weight_grad": ("bwd", 1.3),
}  # fmt: skip
MODES = {"eval": 1.0, "train_fwd": 1.5, "bwd": 3.2, "step": 4.7}


def row(**changes) -> Row:
    """A row that passed, of 0.1 ms ± 1 %."""
    fields = {
        "suite": "layers", "op": "rir_layer", "shape": "96@32", "batch": 256, "dtype": "bf16", "impl": "auto",
        "mode": "step", "graph": True, "passed": True, "ms_median": 0.1,
    } | changes  # fmt: skip
    if (median := fields["ms_median"]) is not None:
        fields = {"ms_q1": 0.99 * median, "ms_q3": 1.01 * median} | fields
    return Row(**fields)


def results(rows=(), **changes) -> Results:
    """Results of a GPU that does not exist."""
    fields = {
        "created": "2020-01-02T03:04:05Z", "command": "python -m bench",
        "device": {"name": "Made-up GPU", "type": "cuda", "multiprocessors": 100},
        "versions": {"python": "3.11", "torch": "9.8"}, "git_commit": "0123456789abcdef", "git_dirty": False,
        "sources_hash": "feedbeefcafe0123", "settings": {"rounds": 3},
        "ceilings": {"copy_gbps": 4000.0, "l2_gbps": 9000.0, "matmul_tflops": {"bf16": 800.0}}, "rows": list(rows),
    } | changes  # fmt: skip
    return Results(**fields)


CPU = {"name": "Made-up CPU", "type": "cpu", "threads": 2}


def everything() -> Results:
    """Rows of all three suites: 11 shapes, networks at four batches, cold and eager timings, failures."""
    return results([*kernels(), *layers(), *models()], absent={"tensorrt": "not installed"}, unreached=["one", "two"])


def kernels() -> list[Row]:
    rows = []
    for shape, us in SHAPES.items():
        for op, (mode, share) in KERNELS.items():
            intensity = (300 * us / 55 if "conv" in op or "grad" in op else 1.5) * wobble(op)
            for impl in ("merged", "cudnn", "torch", "triton"):
                ms = 1e-3 * us * share * FACTORS[impl] * wobble(shape, op, impl)
                tflops = min(632, 3.0 * intensity) / FACTORS[impl] * wobble(shape, op)
                rates = {"tflops": tflops, "gbps": 1e3 * tflops / intensity, "roofline_fraction": 0.8 / FACTORS[impl]}
                rows.append(row(suite="kernels", op=op, shape=shape, mode=mode, impl=impl, ms_median=ms, **rates))
    return rows


def layers() -> list[Row]:
    rows = []
    for op in ("rir_layer", "basic_block"):
        for mode, share in MODES.items():
            for shape, us in SHAPES.items():
                for batch in (256,) if shape != "96@32" else (256, 32, 8, 1):
                    same = {"op": op, "mode": mode, "shape": shape, "batch": batch}
                    rows += timings(same, 1e-3 * (us * share * batch / 256 + 5))
    return rows


def timings(same, ms):
    rows = []
    for impl, factor in FACTORS.items():
        if impl == "tensorrt" or (impl == "cudnn" and same["mode"] != "eval"):
            continue
        ours = ms * factor * wobble(*same.values(), impl)
        if impl == "compile" and same["shape"] == "512@7":
            error = "largest error 0.5 | budget\n0.01 <b>"
            rows += [row(**same, impl=impl, ms_median=None, passed=False, error=error)]
            continue
        rows.append(row(**same, impl=impl, ms_median=ours, roofline_fraction=0.7 / factor))
        rows.append(row(**same, impl=impl, ms_median=1.2 * ours, l2="cold"))
        rows.append(row(**same, impl=impl, ms_median=ours + 0.08, graph=False, host_ms=0.05 * factor))
    return rows


def models() -> list[Row]:
    rows = []
    for op, shape, each in (("rir_wide", "32", 0.02), ("resnet18", "224", 0.05), ("resnet50", "224", 0.12)):
        for batch in (1, 32, 128, 256):
            for mode, share in (("eval", 1.0), ("step", 3.5)):
                for impl in ("reference", "merged", "compile", "compile_max_autotune", "hybrid", "auto"):
                    ms = share * (each * batch + 0.5) * FACTORS[impl] ** 0.5 * wobble(op, batch, mode, impl)
                    rates = {"images_per_s": 1e3 * batch / ms, "peak_mib": 20.0 * batch * share}
                    same = {"suite": "models", "op": op, "shape": shape, "batch": batch, "mode": mode}
                    rows.append(row(**same, impl=impl, ms_median=ms, **rates))
    return rows


def wobble(*key) -> float:
    """A factor between 0.8 and 1.2 that looks random."""
    return 0.8 + 0.4 * hashlib.sha256(repr(key).encode()).digest()[0] / 255
