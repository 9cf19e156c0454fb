"""The figure that a user looks for: a network's training step, eager, compiled, and after fuse_, with its memory.

bf16 autocast, channels_last, SGD, random images and labels: `bench.cases.models` at its batch, which is halved until
the eager step fits into memory and takes less than a second. What a clock is held to is judged as well, last, since the
judge runs the network in fp64.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.cases import models
from bench.cases.case import random_input
from bench.cases.modules import Judge, prepared
from bench.measure import timing

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
    torch.backends.cudnn.benchmark = True  # for every form, as in training
    for network in (Network("tiny", _Tiny, _convert_tiny, 8),) if machine.dry else NETWORKS:
        batch = _batch(journal, machine, network)
        if batch is None:
            continue
        forms = _Forms(machine, network, batch)
        for label in forms.impls:
            journal.take(f"{network.name}, {label}", lambda forms=forms, label=label: forms.first(label))
        alive = [label for label in forms.impls if journal.items[f"{network.name}, {label}"]["status"] == "done"]
        journal.take(f"{network.name}, in turns", lambda forms=forms, alive=alive: forms.in_turns(alive))
        forms.steps.clear()
        timing.release(machine.device)
        journal.take(f"{network.name}, is right", forms.judged)


def _batch(journal, machine, network):
    """The batch that the network is timed at, None where there is none."""
    name = f"{network.name}, batch"
    journal.take(name, lambda: _find_batch(machine, network))
    return journal.items[name].get("batch")


def _find_batch(machine, network):
    batch = machine.batch
    while True:
        try:
            step = _Forms(machine, network, batch).step(EAGER)
            found = timing.measure_eager({EAGER: step}, machine.device, timing.Settings(rounds=1, sample_ms=0.0))[EAGER]
            if (found.error is None and found.samples[0] < SECOND) or batch == 1:
                return {"batch": batch}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        timing.release(machine.device)
        batch //= 2


class _Forms:
    """Training steps of one network at one batch, each from the same weights, images and labels."""

    def __init__(self, machine, network, batch):
        torch.manual_seed(0)
        self._machine, self._network, self._batch = machine, network, batch
        self.impls = {EAGER: "reference", OURS: machine.impl, COMPILED: "compile"}
        self.steps = {}
        self._x = random_input(batch, 3, network.size, torch.float32, machine.device)
        self._module = prepared(models.Autocast(network.make(), machine.dtype), torch.float32, machine.device)
        with torch.no_grad():
            logits = self._module.eval()(self._x[:2])
        self._module.train()
        self._y = logits.new_empty(batch, logits.shape[1])

    def step(self, label) -> Callable[[], torch.Tensor]:
        """A training step, which returns its loss; it is made, and compiled, once."""
        if label not in self.steps:
            step = models.training_calls(self._converted(self.impls[label]), self._x, self._y)["step"]
            step()
            self.steps[label] = step
        return self.steps[label]

    def first(self, label) -> dict:
        """Its first figures: they are there even if there is no time for the others."""
        step = self.step(label)
        loss = step().item()
        timed = timing.measure_eager({label: step}, self._machine.device, self._machine.settings)[label]
        peak = timing.peak_mib(step, self._machine.device)
        return {"batch": self._batch, "loss": loss, "peak_mib": peak, **self._figures(timed)}

    def in_turns(self, labels) -> dict:
        """All forms interleaved, which is how times are to be compared."""
        steps = {label: self.step(label) for label in labels}
        found = timing.measure_eager(steps, self._machine.device, self._machine.settings)
        return {"batch": self._batch, "times": {label: self._figures(timed) for label, timed in found.items()}}

    def judged(self) -> dict:
        """Whether our form is right, by the benchmark's gate."""
        judge = Judge(self._converted("reference"), self._x, True)
        verdict = judge.variant(self._machine.impl, self._converted(self._machine.impl), lambda *_: {}).check()
        found = {"passed": verdict.passed, "budget_used": verdict.budget_used, "note": verdict.note}
        return found if verdict.passed else found | {"status": "failed", "error": verdict.error}

    def _converted(self, impl):
        return self._network.convert(impl, self._module, self._x, training=True)

    def _figures(self, timed):
        if timed.error:
            return {"error": timed.error}
        ms = statistics.median(timed.samples)
        host_ms = statistics.median(timed.host)
        return {"ms": ms, "host_ms": host_ms, "images_per_s": self._batch / ms * 1e3, "samples": timed.samples}
