"""Everything that can be shown on the emulated GPU: python -m tests.machine [quick] [--out DIR]

Runs the tests marked gpu and those of tests/machine, the long ones of these too: hours, in pieces if need be, as tests
that have passed on the same sources are not run again. quick: in minutes, and nothing is left in DIR. The last line is
"N checks, M failed".
"""

import argparse
import collections
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tooling import provenance
from tooling.files import now
from tooling.sources import sources_hash

from .record import PASSED, RECORD

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "bench/results/emulated"
QUICK = [["--sample", "32", "tests"]]
FULL = [
    ["tests"],
    ["--long", "tests/machine"],
    ["--arch", "80", "tests/kernels"],
    ["--arch", "100", "tests/kernels", "tests/machine"],
]


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.machine", description=__doc__.splitlines()[0])
    parser.add_argument("how", nargs="?", choices=("quick",), help="one in 32 of the GPU's tests, and no long ones")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="for the record and its summary")
    parser.add_argument("-n", dest="workers", default="auto", help="test processes (default: one a core)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if args.how else args.out
        out.mkdir(parents=True, exist_ok=True)
        record = out / f"{_hash_of_all()[:12]}.partial"
        for selection in QUICK if args.how else FULL:
            _run(selection, record, args.workers, Path(folder, "passed"))
        tests = _last(record)
        if not args.how:
            (out / "machine.json").write_text(json.dumps(_summary(tests), indent=1) + "\n")
    failed = [name for name, test in tests.items() if test["outcome"] == "failed"]
    for name in failed:
        print(f"FAILED {name}")
    print(f"{sum(test['outcome'] != 'skipped' for test in tests.values())} checks, {len(failed)} failed")
    return 1 if failed or not tests else 0


def _run(selection, record, workers, passed):
    passed.write_text("\n".join(name for name, test in _last(record).items() if test["outcome"] == "passed"))
    command = [sys.executable, "-m", "pytest", "-q", "--emulated", "-n", workers, "--dist", "loadgroup", "--tb=short"]
    environment = os.environ | {RECORD: str(record), PASSED: str(passed)}
    subprocess.run([*command, "-p", "tests.machine.record", *selection], cwd=ROOT, env=environment, check=False)


def _last(record):
    """How each test ended when it last ran."""
    lines = record.read_text().splitlines() if record.exists() else []
    return {line["test"]: line for line in map(json.loads, lines)}


def _hash_of_all():
    """Of all that decides how a test ends, but for the packages."""
    digest = hashlib.sha256(sources_hash("machine").encode())
    for folder in ("emulator", "tests"):
        for path in sorted((ROOT / folder).rglob("*.[pc]*")):
            if path.suffix in (".py", ".c"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _summary(tests):
    found = collections.defaultdict(collections.Counter)
    for name, test in tests.items():
        found["/".join(name.split("::")[0].split("/")[:2])][test["outcome"]] += 1  # "sm_90 tests/kernels"
    outcomes = collections.Counter(test["outcome"] for test in tests.values())
    commit, dirty = provenance.git_state()
    return {
        "kind": "machine", "schema": 1, "created": now(), "emulated": True,
        "versions": provenance.versions(), "git_commit": commit, "git_dirty": dirty,
        "sources_hash": sources_hash("machine"),
        "passed": outcomes["passed"], "failed": outcomes["failed"], "skipped": outcomes["skipped"],
        "processor_hours": round(sum(test["seconds"] for test in tests.values()) / 3600, 2),
        "parts": {part: dict(counts) for part, counts in sorted(found.items())},
        "skips": dict(collections.Counter(t["why"] for t in tests.values() if t["outcome"] == "skipped").most_common()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
