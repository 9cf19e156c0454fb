"""One cell: its environment is made, judged and removed."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from bench.tools.matrix.cells import GATE, SUITES, Cell
from bench.tools.matrix.junit import read
from bench.tools.matrix.pythons import find_python
from tooling.files import now
from tooling.process import run_limited

KIND, SCHEMA = "matrix", 1
LIMITS = {"install": 3600.0, "versions": 300.0, "tests": 1800.0, "gate": 1800.0}  # seconds
SHOWN = 500  # characters of why a step failed


class StepError(RuntimeError):
    """A step that came to no result; the text says why."""


def run_cell(
    cell: Cell, hash_of_sources: str, venvs: Path | None, named: Mapping[str, str], tell: Callable[[str, str], object]
) -> dict:
    """What bench/README.md documents as a file of the matrix. What goes wrong in it stands in "errors", by step.

    venvs: the folder that the environment is made in; the system's temporary one by default. named: interpreters by
    version. tell(step, line) hears what is done.
    """
    found = {
        "kind": KIND, "schema": SCHEMA, "created": now(), "sources_hash": hash_of_sources, "cell": asdict(cell),
        "versions": {}, "seconds": {}, "suites": {}, "failures": [], "gate": {}, "errors": {},
    }  # fmt: skip
    if venvs is not None:
        venvs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{cell.name}-", dir=venvs))
    environment = _Environment(folder, tell)
    steps = {
        "install": lambda: environment.install(cell, named),
        "versions": lambda: found.update(versions=environment.versions(cell)),
        "tests": lambda: found.update(zip(("suites", "failures"), environment.tests(), strict=True)),
        "gate": lambda: found.update(gate=environment.gate()),
    }
    try:
        for step, take in steps.items():
            tell(step, "")
            began = time.monotonic()
            try:
                take()
            except (StepError, LookupError) as error:
                found["errors"][step] = str(error)
            except Exception as error:  # a broken environment must not keep the next cell from its turn
                found["errors"][step] = f"{type(error).__name__}: {error}"
            found["seconds"][step] = round(time.monotonic() - began, 1)
            if found["errors"].keys() & {"install", "versions"}:
                break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


class _Environment:
    """The folder of one cell: a virtual environment, and the caches of what runs in it."""

    def __init__(self, folder, tell):
        self._folder, self._tell = folder, tell
        self._python = str(folder / "venv" / "bin" / "python")

    def install(self, cell, named):
        python = find_python(cell.python, named)
        self._run("install", [python, "-m", "venv", "--without-pip", str(self._folder / "venv")])
        # Triton first, or a CPU build of torch would fetch the newest; and last, since one for CUDA brings another
        triton = ["--no-deps", f"triton=={cell.triton}"]
        for what in (triton, [f"torch=={cell.torch}", f"numpy=={cell.numpy}", "--editable", ".[dev]"], triton):
            # this environment's pip serves all cells: they share its cache
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python", self._python]
            self._run("install", [*pip, "install", "--progress-bar", "off", "--no-compile", *what])

    def versions(self, cell):
        file = self._folder / "versions.json"
        code = "import json, sys, rir_kernels as rir; json.dump(rir.env_report(), open(sys.argv[1], 'w'))"
        self._run("versions", [self._python, "-c", code, str(file)])
        report = json.loads(file.read_text(encoding="utf-8"))
        found = {name: report[name] for name in ("python", "torch", "triton", "numpy", "cuda", "platform")}
        for name in ("python", "torch", "triton", "numpy"):
            wanted = getattr(cell, name)
            if not f"{found[name]}.".replace("+", ".").startswith(f"{wanted}."):
                raise StepError(f"asked for {name} {wanted}, and {found[name]} is what runs")
        return found

    def tests(self):
        file = self._folder / "junit.xml"
        files = [file for files in SUITES.values() for file in files]
        pytest = [self._python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
        pytest += ["--continue-on-collection-errors", "--color=no"]
        # 1: some failed; 2: a file could not be imported, which is counted too
        self._run("tests", [*pytest, f"--junitxml={file}", *files], accepted=(0, 1, 2), leaves=file)
        return read(file, SUITES)

    def gate(self):
        file = self._folder / "gate.json"
        command = [self._python, "-m", "rir_kernels.triton.inspect", *GATE, "--json", str(file)]
        self._run("gate", command, accepted=(0, 1), leaves=file)
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        faults = sorted({fault for row in rows for fault in row["faults"]})
        failed, spilling = (sum(bool(row[name]) for row in rows) for name in ("faults", "spills"))
        return {"kernels": len(rows), "failed": failed, "spilling": spilling, "faults": faults}

    def _run(self, step, command, accepted=(0,), leaves=None):
        """leaves: the file that it must have written."""
        own = {name: str(self._folder / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        own["CUDA_VISIBLE_DEVICES"] = ""  # a result is the same with a GPU and without
        ended = run_limited(
            command, LIMITS[step], echo=lambda line: self._tell(step, line), environment=os.environ | own
        )
        if ended.code not in accepted or (leaves is not None and not leaves.exists()):
            raise StepError(ended.why or self._reason(ended))

    def _reason(self, ended):
        """From the first line that says ERROR, as pip's do; else the last one, as Python's is."""
        lines = [line.strip() for line in ended.lines if line.strip()]
        start = next((index for index, line in enumerate(lines) if line.startswith("ERROR")), len(lines) - 1)
        text = " ".join(lines[max(start, 0) : start + 4]) or f"ended with status {ended.code}, and said nothing"
        return text.replace(str(self._folder), "DIR").replace(str(Path.cwd()), ".")[:SHOWN]
