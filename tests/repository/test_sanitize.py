"""scripts/sanitize.sh, with a compute-sanitizer that is made up: every tool runs, and what one finds is not lost."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sanitize.sh"
SYSTEM = "/usr/bin:/bin"
MADE_UP = """#!/usr/bin/env bash
while [ $# -gt 0 ]; do
    case $1 in
        --tool) tool=$2; shift 2 ;;
        --log-file) log=$2; shift 2 ;;
        --*) shift 2 ;;
        *) break ;;
    esac
done
[ "$tool" != "$SILENT" ] && echo "$* caching=$PYTORCH_NO_CUDA_MEMORY_CACHING" >"$log"
[ "$tool" != "$FOUND_BY" ]
"""


def sanitize(tmp_path, found_by="none", silent="none", installed=True):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    if installed:
        tool.write_text(MADE_UP)
        tool.chmod(0o755)
    environment = {
        "PATH": f"{tool.parent}:{SYSTEM}",
        "FOUND_BY": found_by,
        "SILENT": silent,
        "HOME": os.environ.get("HOME", "/"),
    }
    return subprocess.run(
        [SCRIPT, "the-python", tmp_path / "out", "tests/some.py"], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("found_by", "status"), [("none", 0), ("memcheck", 1), ("racecheck", 1), ("initcheck", 1)])
def test_every_tool_runs_and_counts(found_by, status, tmp_path):
    assert sanitize(tmp_path, found_by).returncode == status
    logs = {log.stem: log.read_text() for log in (tmp_path / "out").iterdir()}
    assert logs.keys() == {"memcheck", "racecheck", "initcheck"}
    for text in logs.values():
        assert text.startswith("the-python -m pytest") and text.endswith("tests/some.py caching=1\n")


def test_a_tool_that_leaves_no_log_counts_as_one_that_found_something(tmp_path):
    assert sanitize(tmp_path, silent="memcheck").returncode == 1
    assert {log.stem for log in (tmp_path / "out").iterdir()} == {"racecheck", "initcheck"}


@pytest.mark.skipif(shutil.which("compute-sanitizer", path=SYSTEM) is not None, reason="it is there")
def test_without_the_tool_nothing_is_passed(tmp_path):
    done = sanitize(tmp_path, installed=False)
    assert done.returncode == 2 and "comes with the CUDA toolkit" in done.stderr
