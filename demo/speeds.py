"""Times of one layer on a GPU: four naive convolutions, and every implementation of ours, by the benchmark's clock."""

import statistics

import torch

from bench.cases import layers
from bench.measure import timing

IMPLS = {"naive": "reference", "auto": "auto", "triton": "triton", "hybrid": "hybrid", "torch": "torch"}
MODES = {"inference": (False, "eval"), "training step": (True, "step")}
SETTINGS = timing.Settings(rounds=9)


def measure(shape, device, dtype=torch.bfloat16, settings=SETTINGS) -> list[dict]:
    """Milliseconds of each variant, of inference and of a training step (forward and backward), of one layer.

    On a GPU of CUDA graphs with a warm cache. RuntimeError where a variant is not right: it would not be worth timing.
    """
    build = layers.set_up("rir_layer", shape, dtype, device)
    return [
        {"shape": shape.name, "batch": shape.batch, "mode": name, "ms": _milliseconds(build, *mode, device, settings)}
        for name, mode in MODES.items()
    ]


def _milliseconds(build, training, mode, device, settings):
    variants = {name: build(impl, training) for name, impl in IMPLS.items()}
    for name, variant in variants.items():
        verdict = variant.check()
        if not verdict.passed:
            raise RuntimeError(f"{name}: {verdict.error}")
    calls = {name: variant.calls[mode] for name, variant in variants.items()}
    found = timing.measure_steady(calls, device, settings)
    for name, timed in found.items():
        if timed.error:
            raise RuntimeError(f"{name}: {timed.error}")
    return {name: statistics.median(timed.samples) for name, timed in found.items()}
