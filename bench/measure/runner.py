"""Runs cases: sets up, judges, times, and makes rows of it."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from bench.cases.case import Case, Variant
from bench.measure import timing
from bench.measure.gate import Verdict
from bench.measure.roofline import total
from bench.peers import compiled
from bench.schema import Row


class Runner:
    """One device, one set of ceilings, and the implementations asked for."""

    def __init__(self, device: torch.device, settings: timing.Settings, ceilings: dict, impls: tuple[str, ...]):
        self.device, self.settings, self.ceilings, self.impls = device, settings, ceilings, impls

    def run(self, case: Case, reach: Callable = lambda part, what: None) -> Iterator[Row]:
        """The rows of the case, as they come; raises timing.DeviceLost where no more can come.

        reach(part, what) is called before each step: `part` of the case, from 0 to 1, is done, `what` comes next.
        """
        impls = [impl for impl in case.impls if impl in self.impls]
        done, steps = itertools.count(), sum(len(impls) + len(modes) for modes in case.modes.values())
        try:
            build = case.set_up(self.device)
        except Exception as error:  # the reference itself does not fit, say: nothing can be judged
            for modes in case.modes.values():
                yield from (row for impl in impls for row in _refused(case, impl, modes, _text(error)))
            self._recover(error)
            return
        for training, modes in case.modes.items():
            compiled.forget()
            judged = {}
            for impl in impls:
                reach(next(done) / steps, f"checking {impl}")
                try:
                    variant, verdict = self._judge(build, impl, training)
                except Exception as error:
                    yield from _refused(case, impl, modes, _text(error))
                    self._recover(error)
                    continue
                if verdict.passed:
                    judged[impl] = variant, verdict
                else:
                    yield from _refused(case, impl, modes, verdict.error, budget_used=verdict.budget_used)
            rows = []
            for mode in modes:
                reach(next(done) / steps, f"timing {mode}")
                for row in self._time(case, mode, judged):
                    rows.append(row)
                    yield row
            yield from _backward(case, rows, self.ceilings)
            judged.clear()
            timing.release(self.device)

    def _judge(self, build, impl, training) -> tuple[Variant, Verdict]:
        start = time.perf_counter()
        variant = build(impl, training)
        verdict = variant.check()
        timing.synchronize(self.device)
        variant.config["set_up_s"] = round(time.perf_counter() - start, 2)  # compiling and tuning included
        if verdict.note:
            variant.config["gate"] = verdict.note
        return variant, verdict

    def _time(self, case, mode, judged):
        calls = {impl: variant.calls[mode] for impl, (variant, _) in judged.items() if mode in variant.calls}
        found = timing.measure(calls, self.device, self.settings)
        for impl, timings in found.items():
            variant, verdict = judged[impl]
            alive = any(t.error is None for t in timings)
            peak = timing.peak_mib(calls[impl], self.device) if alive else None
            for t in timings:
                yield _row(
                    case, impl, mode, t, self.ceilings,
                    peak_mib=peak, passed=True, budget_used=verdict.budget_used, config=variant.config,
                )  # fmt: skip

    def _recover(self, error):
        timing.check_device(self.device, error)
        timing.release(self.device)


def _refused(case, impl, modes, error, **fields) -> list[Row]:
    return [_row(case, impl, mode, timing.Timing(error=error), None, passed=False, **fields) for mode in modes]


def _row(case, impl, mode, t, ceilings, **fields) -> Row:
    row = {
        "suite": case.suite, "op": case.op, "shape": case.shape, "batch": case.batch, "dtype": case.dtype,
        "impl": impl, "mode": mode, "graph": t.graph, "l2": t.l2, "error": t.error, "samples": t.samples,
    }  # fmt: skip
    if t.samples:
        q1, median, q3 = quartiles(t.samples)
        row |= {"ms_median": median, "ms_q1": q1, "ms_q3": q3, "host_ms": statistics.median(t.host) if t.host else None}
        row |= _rates(case, mode, median, ceilings)
    return Row(**row, **fields)


def _rates(case, mode, ms, ceilings):
    rates = {"images_per_s": case.batch / ms * 1e3}
    passes = case.passes.get(mode)
    if passes:
        whole = total(passes)
        rates["tflops"] = whole.flops / ms / 1e9
        if whole.bytes:  # of whole networks the arithmetic alone is counted, and no floor is known
            floor = sum(p.floor_ms(ceilings, case.dtype) for p in passes)
            rates |= {"gbps": whole.bytes / ms / 1e6, "floor_ms": floor, "roofline_fraction": floor / ms}
    return rates


def _backward(case, rows, ceilings):
    """Rows of the backward pass alone: every sample of the step, less the median of the forward pass."""
    forward = {(row.impl, row.graph, row.l2): row for row in rows if row.mode == "train_fwd"}
    for step in rows:
        before = forward.get((step.impl, step.graph, step.l2))
        if step.mode != "step" or step.l2 != "warm" or before is None or not (step.samples and before.samples):
            continue
        t = timing.Timing(graph=step.graph, samples=[sample - before.ms_median for sample in step.samples])
        if step.ms_median <= before.ms_median:
            t = timing.Timing(graph=step.graph, error="too noisy: the step took no longer than its forward pass")
        config = step.config | {"derived": "step - median of train_fwd"}
        yield _row(case, step.impl, "bwd", t, ceilings, passed=True, budget_used=step.budget_used, config=config)


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)"""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


def _text(error: BaseException) -> str:
    """The error in a line that fits a table; a compiler's message goes on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
