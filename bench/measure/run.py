"""Runs suites: one results file each, written after every case, so that a run that is cut short loses nothing."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import peers
from bench.cases.case import Case
from bench.cases.selection import Selection
from bench.measure import live, timing
from bench.measure.ceilings import measure_ceilings
from bench.measure.runner import Runner
from bench.schema import OURS, Results, ResultsError, load
from rir_kernels.common.switches import overlap_asked, tf32_allowed
from tooling import console, provenance
from tooling.files import now

QUICK = timing.Settings(rounds=5, sample_ms=1.0, warmup=1)


def run_suite(
    suite: str,
    cases: Sequence[Case],
    selection: Selection,
    impls: Sequence[str],
    path: Path,
    *,
    command: Sequence[str],
    minutes: float | None,
    resume: bool = False,
) -> Results:
    """Measures the suite's `cases` on the device and leaves the file `path` behind.

    minutes: no case is begun that could end later, if it takes as long as the longest so far.
    resume: the cases that an earlier run of the same kind left in the file stay, and are not measured again; nor is the
        one at which its process ended.
    """
    started = time.monotonic()
    device = torch.device(selection.device_type)
    settings = QUICK if selection.quick else timing.Settings()
    wanted = dict.fromkeys(impl for case in cases for impl in case.impls if impl in impls)
    absent = {impl: reason for impl in wanted if (reason := peers.absent(impl, device))}
    results = _results(suite, device, settings, selection, command, absent)
    if resume:
        _continue(results, path)
    finished = {row.of for row in results.rows} | set(results.lost)
    cases = [case for case in cases if str(case) not in finished]

    console.say(f"{suite}: {len(cases)} cases on {results.device['name']}")
    for impl, reason in absent.items():
        console.say(f"  {impl} is left out: {reason}")
    with console.progress(suite, len(cases)) as reach:
        reach(0, "ceilings")
        if cases and not results.ceilings:
            results.ceilings = measure_ceilings(device, selection.chosen_dtypes(), settings)
        runner = Runner(device, settings, results.ceilings, tuple(impl for impl in wanted if impl not in absent))
        longest = 0.0
        for index, case in enumerate(cases):
            begun = time.monotonic()
            results.unreached = [str(case) for case in cases[index:]]
            if minutes is not None and begun - started + longest > 60 * minutes:
                break
            reach(index, str(case))
            before = len(results.rows)

            def within(part, what, index=index, case=case):
                reach(index + part, f"{case}: {what}")

            results.begun = str(case)
            results.save(path)
            try:
                for row in runner.run(case, within):
                    results.rows.append(row)
            except timing.DeviceLost as error:
                results.device["lost"] = str(error)
                results.save(path)
                raise SystemExit(f"the device is lost: {error}\nwhat was measured before is in {path}") from error
            live.show(str(case), results.rows[before:])
            results.begun, results.unreached = None, results.unreached[1:]
            results.save(path)
            longest = max(longest, time.monotonic() - begun)
    results.device["after"] = provenance.driver_state(device)
    results.settings["seconds"] = round(time.monotonic() - started, 1)
    results.save(path)
    console.say(f"{len(results.rows)} rows in {path}")
    if results.unreached:
        console.say(f"{len(results.unreached)} cases were not reached: {', '.join(results.unreached[:3])}, ...")
    return results


def refused_ours(results: Results) -> list[str]:
    """Implementations of ours that a gate refused, one line each."""
    lines = (
        f"{row.of} {row.impl}: {row.error}"
        for row in results.rows
        if row.impl in OURS and row.error and row.error.startswith("gate:")
    )
    return list(dict.fromkeys(lines))


def _results(suite, device, settings, selection, command, absent):
    torch.backends.cudnn.benchmark = True
    if tf32_allowed():  # what convolutions do is what the matrix product's ceiling is measured with
        torch.set_float32_matmul_precision("high")
    found = provenance.of_a_run(device, suite)
    found["versions"] |= peers.versions()
    return Results(
        created=now(),
        command=shlex.join(["python", "-m", "bench", *command]),
        **found,
        settings={
            **dataclasses.asdict(settings),
            "quick": selection.quick,
            "tf32": tf32_allowed(),
            "cudnn_benchmark": True,
            "overlap": overlap_asked(),
        },
        ceilings={},
        absent=absent,
    )


def _continue(results, path):
    """Takes over what the file has, if it was measured with the same code, on the same device, in the same way."""
    try:
        earlier = load(path)
    except ResultsError:
        return
    made_with = [
        (r.sources_hash, r.device["name"], r.versions, {**r.settings, "seconds": None}) for r in (earlier, results)
    ]
    if made_with[0] != made_with[1]:
        return
    results.rows, results.ceilings = earlier.rows, earlier.ceilings
    results.lost = earlier.lost + [earlier.begun] * (earlier.begun is not None)
