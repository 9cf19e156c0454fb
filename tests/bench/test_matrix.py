"""The matrix of versions: its cells, what is written of them, and the range that env_report compares with."""

import re
from dataclasses import asdict

import pytest

from bench.schema import ResultsError
from bench.tools.matrix import __main__ as command
from bench.tools.matrix import document, junit, run
from bench.tools.matrix.cells import CELLS, SUITES, Cell
from bench.tools.matrix.pythons import find_python
from rir_kernels.common import versions
from tooling.files import save_json
from tooling.process import Ended

CELL = Cell("newer", "9.1.0", "5.0.0", "3.99", "4.0.0")
FOUND = {"torch": "9.1.0+cpu", "triton": "5.0.0", "python": "3.99.1", "numpy": "4.0.0"}
OTHER = Cell("older", "8.0.0", "4.0.0", "3.98", "3.0.0")


def numbers(version):
    return tuple(map(int, version.split(".")))


def result(of=CELL, **changes):
    """A cell's file: all passed."""
    counts = {"passed": 5, "failed": 0, "skipped": 2, "seconds": 1.5}
    return {
        "kind": "matrix", "schema": 1, "created": "2026-01-02T03:04:05+00:00", "sources_hash": "0123456789abcdef",
        "cell": asdict(of), "versions": FOUND,
        "seconds": {"install": 1.0}, "suites": {suite: dict(counts) for suite in SUITES}, "failures": [],
        "gate": {"kernels": 7, "failed": 0, "spilling": 0, "faults": []}, "errors": {},
    } | changes  # fmt: skip


def test_cells_are_well_formed():
    assert len({cell.name for cell in CELLS}) == len({tuple(asdict(cell).values())[1:] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert re.fullmatch(r"[a-z0-9.-]+", cell.name)
        assert re.fullmatch(r"3\.\d+", cell.python)
        assert all(re.fullmatch(r"\d+\.\d+\.\d+", text) for text in (cell.torch, cell.triton, cell.numpy))
    files = [file for files in SUITES.values() for file in files]
    assert len(set(files)) == len(files)
    assert [file for file in files if not (command.ROOT / file).exists()] == []


def test_the_range_is_that_of_the_cells():
    """Of those that could be installed: oldest and newest, as minor versions. The README and pyproject name it too."""
    found = document.load(CELLS, command.RESULTS)
    cells = [cell for cell in CELLS if cell.name not in found or document.ran(found[cell.name])]
    for name, tested in versions.TESTED.items():
        ordered = sorted((getattr(cell, name) for cell in cells), key=numbers)
        assert tested == tuple(".".join(version.split(".")[:2]) for version in (ordered[0], ordered[-1])), name
    oldest = {name: oldest for name, (oldest, _) in versions.TESTED.items()}
    assert (numbers(oldest["torch"]), numbers(oldest["triton"])) == (versions.TORCH_NEEDED, versions.TRITON_NEEDED)
    project = (command.ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={oldest["python"]}"' in project
    assert all(f"{name}>={oldest[name]}" in project for name in ("torch", "triton", "numpy"))
    readme = " ".join((command.ROOT / "README.md").read_text().split())
    titles = {"python": "Python"} | document.VERSIONS
    assert all(f"{titles[name]} {a} to {b}" in readme for name, (a, b) in versions.TESTED.items())


def test_versions_outside_the_range(monkeypatch):
    inside = {name: f"{newest}.77" for name, (_, newest) in versions.TESTED.items()}
    assert versions.untested(inside) == []
    assert versions.untested(inside | {"triton": "no (ModuleNotFoundError: triton)"}) == []
    monkeypatch.setattr(versions, "TESTED", {"torch": ("2.10", "2.14"), "numpy": ("1.22", "2.4")})
    found = {"torch": "2.15.0+cpu", "numpy": "1.21.6"}
    assert versions.untested(found) == ["torch 2.15.0+cpu (2.10 to 2.14)", "numpy 1.21.6 (1.22 to 2.4)"]


def test_the_page_is_what_is_written():
    """`python -m bench.tools.matrix --page` after a change of cells or results."""
    found = document.load(CELLS, command.RESULTS)
    assert (command.DOCS / document.PAGE).read_text() == document.page(CELLS, found)


def test_the_page():
    failing = {"passed": 3, "failed": 1, "skipped": 0, "seconds": 2.0}
    found = {
        "newer": result(
            suites=result()["suites"] | {"surgery": failing},
            failures=["tests/surgery/test_fuse.py::test_a: no"],
            gate={"kernels": 7, "failed": 2, "spilling": 1, "faults": ["8 bytes spilled"]},
        )
    }
    third = Cell("third", "1.0.0", "1.0.0", "3.97", "1.0.0")
    found["older"] = result(OTHER, versions={}, suites={}, gate={}, errors={"install": "ERROR: none"})
    page = document.page((CELL, OTHER, third), found)
    assert page.partition("\n| ")[2] == (
        "environment | torch | Triton | Python | NumPy | launches | imports | contract | compile | surgery "
        "| interpreter | kernels | spilling | day | sources |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| newer | 9.1.0+cpu | 5.0.0 | 3.99.1 | 4.0.0 | 5 | 5 | 5 | 5 | 3, **1 failed** | 5 | 5, **2 failed** | 1 "
        "| 2026-01-02 | 01234567 |\n"
        "| older | 8.0.0 | 4.0.0 | 3.98 | 3.0.0 | not run (below) |  |  |  |  |  |  |  | 2026-01-02 | 01234567 |\n"
        "| third | 1.0.0 | 1.0.0 | 3.97 | 1.0.0 | not run yet |  |  |  |  |  |  |  |  |  |\n"
        "\n## What did not run\n\n- older: install: `ERROR: none`\n"
        "\n## Tests that failed\n\n- newer: `tests/surgery/test_fuse.py::test_a: no`\n"
        "\n## The gate\n\n- newer: 8 bytes spilled\n"
    )
    many = document.page((CELL,), {"newer": result(failures=[f"test {i}" for i in range(23)])})
    assert many.endswith("- newer: `test 18`\n- newer: `test 19`\n- newer: and 3 more\n")
    assert document.well(result()) and not document.well(found["newer"]) and not document.well(found["older"])


def test_another_kind_of_file_is_refused(tmp_path):
    save_json(tmp_path / "newer.json", {"kind": "memory", "schema": 1})
    with pytest.raises(ResultsError, match=r"expected kind and schema \('matrix', 1\), got \('memory', 1\)"):
        document.load((CELL,), tmp_path)


def test_what_pytest_found(tmp_path):
    (tmp_path / "junit.xml").write_text("""<testsuites><testsuite>
<testcase classname="tests.kernels.test_layer" name="test_a[x]" time="1.25"/>
<testcase classname="tests.kernels.test_layer.TestB" name="test_b" time="0.5"><skipped message="no GPU"/></testcase>
<testcase classname="tests.kernels.test_layers" name="test_c" time="1"><failure message="no&#10;t"/></testcase>
<testcase classname="" name="tests.test_other" time="0"><error message="collection failure">t</error></testcase>
</testsuite></testsuites>""")
    suites = {
        "one": ("tests/kernels/test_layer.py",),
        "two": ("tests/kernels/test_layers.py", "tests/test_other.py"),
        "three": (),
    }
    counts, failures = junit.read(tmp_path / "junit.xml", suites)
    assert counts == {
        "one": {"passed": 1, "failed": 0, "skipped": 1, "seconds": 1.8},
        "two": {"passed": 0, "failed": 2, "skipped": 0, "seconds": 1.0},
        "three": {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0},
    }
    assert failures == [
        "tests/kernels/test_layers.py::test_c: no",
        "tests/test_other.py::tests.test_other: collection failure",
    ]
    with pytest.raises(LookupError, match=r"'tests\.kernels\.test_layer', which is in no suite"):
        junit.read(tmp_path / "junit.xml", {"two": suites["two"]})


def test_an_environment_that_cannot_be_made(tmp_path, monkeypatch):
    """Is a result with the reason, and nothing of it stays."""
    ran = run.run_cell(CELL, "0", tmp_path, {}, lambda step, line: None)
    assert ran["errors"] == {"install": "no Python 3.99 was found: put python3.99 on PATH, or pass --python 3.99=PATH"}
    lines = ("Collecting torch", "ERROR: No matching distribution found for torch==9.1.0", "in DIR")
    monkeypatch.setattr(run, "find_python", lambda version, named: "python")
    monkeypatch.setattr(run, "run_limited", lambda *args, **options: Ended(1, 0.1, "", lines))
    ran = run.run_cell(CELL, "0", tmp_path, {}, lambda step, line: None)
    assert ran["errors"] == {"install": "ERROR: No matching distribution found for torch==9.1.0 in DIR"}
    monkeypatch.setattr(run, "find_python", lambda version, named: 1 / 0)
    assert run.run_cell(CELL, "0", tmp_path, {}, lambda step, line: None)["errors"] == {
        "install": "ZeroDivisionError: division by zero"
    }
    assert (ran["cell"], ran["versions"], ran["suites"]) == (asdict(CELL), {}, {})
    assert not document.well(ran) and not document.ran(ran)
    assert list(tmp_path.iterdir()) == []


def test_which_cells_are_run(tmp_path, monkeypatch, capsys):
    """Without names those that did not run with these versions and sources."""
    monkeypatch.setattr(command, "CELLS", (CELL, OTHER))
    monkeypatch.setattr(command, "sources_hash", lambda kind: "now")

    def chosen(*only, **changes):
        save_json(tmp_path / "newer.json", result(**changes))
        return [cell.name for cell in command._chosen(only or None, tmp_path)]

    assert chosen(sources_hash="now") == ["older"]
    assert chosen(sources_hash="then") == ["newer", "older"]
    assert chosen(sources_hash="now", cell=asdict(CELL) | {"numpy": "4.0.1"}) == ["newer", "older"]
    assert chosen(sources_hash="now", versions={}) == ["newer", "older"]
    assert chosen("older,newer", sources_hash="now") == ["newer", "older"]
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "newer,new", "--out", str(tmp_path), "--docs", str(tmp_path)])
    assert ended.value.code == 2
    assert "there is no cell new: expected some of newer, older" in capsys.readouterr().err


@pytest.mark.parametrize("failed", [False, True])
def test_the_command(tmp_path, monkeypatch, failed):
    """Goes through the cells and past one that failed, writes files and page, and its status says how it went."""
    monkeypatch.setattr(command, "CELLS", (CELL, OTHER))
    errors = {"newer": {"tests": "killed"} if failed else {}, "older": {}}
    monkeypatch.setattr(command, "run_cell", lambda cell, *_: result(cell, errors=errors[cell.name]))
    assert command.main(["--out", str(tmp_path), "--docs", str(tmp_path)]) == failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer.json", "older.json", "versions.md"]
    assert ("newer: tests: `killed`" in (tmp_path / "versions.md").read_text()) is failed


def test_a_named_python_goes_first(tmp_path):
    """If it is of that version; one that is not there is passed over."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.99\n")
    python.chmod(0o755)
    assert find_python("3.99", {"3.99": str(python)}) == str(python)
    for named in ({}, {"3.99": str(tmp_path / "none")}, {"3.98": str(python)}):
        with pytest.raises(LookupError, match=r"no Python 3\.99"):
            find_python("3.99", named)
