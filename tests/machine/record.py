"""A pytest plugin: writes down how each test ended, as it ends, and leaves out those that have passed before.

$MACHINE_RECORD is a file of one JSON object a line; $MACHINE_PASSED names a file with the passed tests, a line each.
"""

import json
import os
from pathlib import Path

import pytest

RECORD, PASSED = "MACHINE_RECORD", "MACHINE_PASSED"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    passed = set(Path(os.environ[PASSED]).read_text().splitlines())
    arch = config.getoption("--arch")
    config.hook.pytest_deselected(items=[item for item in items if _name(item.nodeid, arch) in passed])
    items[:] = [item for item in items if _name(item.nodeid, arch) not in passed]


class _Writer:
    """Where the tests are dealt out, or run if they are not."""

    def __init__(self, arch):
        self._arch = arch
        self._path = Path(os.environ[RECORD])
        self._tests = {}

    def pytest_runtest_logreport(self, report):
        ends = self._tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "why": ""})
        ends["seconds"] += report.duration
        if report.outcome != "passed" and ends["outcome"] != "failed":
            why = (
                report.longrepr[2]
                if report.skipped and isinstance(report.longrepr, tuple)
                else report.longreprtext[-500:]
            )
            ends |= {"outcome": report.outcome, "why": why.removeprefix("Skipped: ")}
        if report.when == "teardown":
            line = {"test": _name(report.nodeid, self._arch), **self._tests.pop(report.nodeid)}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(config.getoption("--arch")))


def _name(nodeid, arch):
    """Without the group that pytest-xdist adds, and with the GPU."""
    return f"sm_{arch} {nodeid.partition('@tests/')[0]}"
