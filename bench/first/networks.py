"""The figure that a user looks for: a network's training step, eager, compiled, and after fuse_, with its memory.

bf16 autocast, channels_last, SGD, random images and labels: `bench.suites.models` at its batch, which is halved until
the eager step fits into memory and takes less than a second. What a clock is held to is judged as well, last, since the
judge runs the network in fp64.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench import timing
from bench.case import random_input
from bench.modules import Judge, prepared
from bench.suites import models

SECOND = 1e3  # ms
EAGER, COMPILED, OURS = "eager", "torch.compile", "fused"


@dataclass(frozen=True)
class Network:
    name: str
    make: Callable[[], nn.Module]
    convert: Callable  # (impl, module, x, training=...)
    size: int

    def fused(self, machine) -> nn.Module | None:
        """What our kernels run of it, for its units; None where its library is not installed."""
        try:
            return self.convert(machine.impl, self.make(), None, training=True)
        except ImportError:
            return None


def _network(op):
    network = models.OPS[op]
    return Network(op, network.make, network.convert, network.size)


NETWORKS = tuple(_network(op) for op in ("torchvision_resnet50", "rir_wide"))


class _Tiny(nn.Sequential):
    """A network for the stand-in, which has the time for one convolution."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def _convert_tiny(impl, module, x, *, training):
    if impl == "compile":  # Inductor's code would be for the GPU that is not there
        return torch.compile(models.fused_copy("reference", module, x, training=training), backend="eager")
    return models.fused_copy(impl, module, x, training=training)


def run(journal, machine, _seconds):
    impls = {EAGER: "reference", OURS: machine.impl, COMPILED: "compile"}
    for network in (Network("tiny", _Tiny, _convert_tiny, 8),) if machine.dry else NETWORKS:
        batch = _batch(journal, machine, network)
        if batch is None:
            continue
        build = _Builder(machine, network, batch)
        steps = {}

        def set_up(label, impl, build=build, steps=steps):
            step = build.step(impl)
            losses = [step().item() for _ in range(2)]
            steps[label] = step
            return {"batch": build.batch, "losses": losses, "peak_mib": timing.peak_mib(step, machine.device)}

        for label, impl in impls.items():
            journal.take(f"{network.name}, {label}, set up", lambda a=label, b=impl, do=set_up: do(a, b))
        journal.take(f"{network.name}, times", lambda build=build, steps=steps: _times(build, steps, machine))
        steps.clear()
        timing.release(machine.device)
        journal.take(f"{network.name}, is right", lambda build=build: build.judged(machine.impl))


def _batch(journal, machine, network):
    """The batch that the network is timed at, None where there is none."""
    name = f"{network.name}, batch"
    journal.take(name, lambda: _find_batch(machine, network))
    return journal.items[name].get("batch")


def _find_batch(machine, network):
    batch = machine.batch
    while True:
        try:
            step = _Builder(machine, network, batch).step("reference")
            found = timing.measure_eager({EAGER: step}, machine.device, timing.Settings(rounds=1, sample_ms=0.0))[EAGER]
            if (found.error is None and found.samples[0] < SECOND) or batch == 1:
                return {"batch": batch, "ms": found.samples[0]}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        timing.release(machine.device)
        batch //= 2


class _Builder:
    """Training steps of one network at one batch, each from the same weights, images and labels."""

    def __init__(self, machine, network, batch):
        torch.manual_seed(0)
        self.network, self.batch = network, batch
        self._x = random_input(batch, 3, network.size, torch.float32, machine.device)
        self._module = prepared(models.Autocast(network.make(), machine.dtype), torch.float32, machine.device)
        with torch.no_grad():
            logits = self._module.eval()(self._x[:2])
        self._module.train()
        self._y = logits.new_empty(batch, logits.shape[1])

    def step(self, impl) -> Callable[[], torch.Tensor]:
        """A training step, which returns its loss."""
        variant = self.network.convert(impl, self._module, self._x, training=True)
        return models.training_calls(variant, self._x, self._y)["step"]

    def judged(self, impl):
        judge = Judge(self.network.convert("reference", self._module, self._x, training=True), self._x, True)
        variant = self.network.convert(impl, self._module, self._x, training=True)
        checked = judge.variant(impl, variant, lambda *_: {})
        verdict = checked.check()
        found = {"passed": verdict.passed, "budget_used": verdict.budget_used, "note": verdict.note}
        return found if verdict.passed else found | {"status": "failed", "error": verdict.error}


def _times(build, steps, machine):
    found = timing.measure_eager(steps, machine.device, machine.settings)
    times = {
        label: {
            "ms": statistics.median(t.samples), "host_ms": statistics.median(t.host), "samples": t.samples,
            "images_per_s": build.batch / statistics.median(t.samples) * 1e3,
        } if t.samples else {"error": t.error}
        for label, t in found.items()
    }  # fmt: skip
    return {"batch": build.batch, "times": times}
