"""What pytest found, by suite, out of the file that it writes with --junitxml."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

SHOWN = 200  # characters of a message


def read(junit: Path, suites: Mapping[str, Sequence[str]]) -> tuple[dict[str, dict], list[str]]:
    """({suite: passed, failed, skipped, seconds}, "file::test: message" of each failure).

    suites: the test files of each, relative to the checkout. A file that could not be imported is one failure.
    LookupError for a test that is in none.
    """
    owner = {_dotted(file): suite for suite, files in suites.items() for file in files}
    counts = {suite: {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0} for suite in suites}
    failures = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        where = case.get("classname") or case.get("name", "")
        module = next((name for name in owner if where == name or where.startswith(f"{name}.")), None)
        if module is None:
            raise LookupError(f"pytest told of {where!r}, which is in no suite")
        suite = counts[owner[module]]
        suite["seconds"] += float(case.get("time", 0))
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            suite["failed"] += 1
            message = (problem.get("message") or "").split("\n", 1)[0][:SHOWN]
            failures.append(f"{module.replace('.', '/')}.py::{case.get('name')}: {message}")
        else:
            suite["passed" if case.find("skipped") is None else "skipped"] += 1
    for suite in counts.values():
        suite["seconds"] = round(suite["seconds"], 1)
    return counts, failures


def _dotted(file):
    return file.removesuffix(".py").replace("/", ".")
