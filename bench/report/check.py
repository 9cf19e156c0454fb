"""Are the committed results of the current code? An answer for each file, by its kind."""

import json
from pathlib import Path
from typing import NamedTuple

from bench.schema import SUITES, Results, ResultsError, load, read_json
from tooling.sources import KINDS, sources_hash

FOLDER = Path(__file__).resolve().parents[1] / "results"
INDEPENDENT = {"hessian"}  # kinds that no code of rir_kernels has a part in


class Status(NamedTuple):
    path: Path
    text: str
    failed: bool


def check(folder: str | Path = FOLDER) -> list[Status]:
    """The status of every *.json and *.jsonl below `folder`; empty where nothing is committed.

    What fails: a file that is stale (the code that its figures depend on has changed since), unknown or unreadable.
    """
    paths = [path for path in Path(folder).rglob("*") if path.suffix in (".json", ".jsonl")]
    return [_status(path) for path in sorted(paths)]


def is_stale(results: Results) -> bool:
    """Whether the code that figures of the benchmark depend on has changed since they were measured."""
    return results.sources_hash != sources_hash(_suite(results), results.device)


def _suite(results):
    """What the rows are of; each suite depends on what those before it depend on, and more."""
    present = {row.suite for row in results.rows}
    return next((suite for suite in reversed(SUITES) if suite in present), SUITES[-1])


def _status(path):
    try:
        return Status(path, *(_of_log(path) if path.suffix == ".jsonl" else _of_json(path)))
    except ValueError as error:
        return Status(path, str(error), True)


def _of_json(path):
    data = read_json(path)
    if not isinstance(data, dict) or not data.keys() & {"kind", "schema"}:
        raise ResultsError("unknown: expected an object with a `kind`, or a benchmark's with its `schema`")
    if "kind" not in data:
        results = load(path)
        return _verdict(_suite(results), is_stale(results), results.git_dirty)
    kind = str(data["kind"])
    if kind in INDEPENDENT:
        return f"{kind}: depends on no code of rir_kernels", False
    if kind not in KINDS:
        known = ", ".join(sorted({*KINDS, *INDEPENDENT} - {*SUITES}))
        raise ResultsError(f"unknown kind {kind!r}, expected one of {known}: name new ones in tooling/sources.py")
    if "sources_hash" not in data:
        return f"{kind}: not checked: it names no sources", False
    stale = data["sources_hash"] != sources_hash(kind, data.get("device"))
    return _verdict(kind, stale, data.get("git_dirty"))


def _verdict(kind, stale, dirty):
    text = f"{kind}: stale: the code it depends on has changed since; measure again" if stale else f"{kind}: current"
    return text + "; taken with changes that were not committed" * bool(dirty), stale


def _of_log(path):
    """Of a training run's metrics.jsonl."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ResultsError(f"cannot be read as JSON lines ({error})") from error
    if not all(isinstance(record, dict) and "epoch" in record for record in records):
        raise ResultsError("unknown: expected a training run's log, each line an object with an `epoch`")
    return "log of a training run: not checked: it names no sources", False
