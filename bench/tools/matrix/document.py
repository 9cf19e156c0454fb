"""What people read of the matrix: docs/versions.md, from the files of its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.schema import ResultsError, read_json
from bench.tools.matrix.cells import GATE, SUITES, Cell
from bench.tools.matrix.run import KIND, SCHEMA

PAGE = "versions.md"
VERSIONS = {"torch": "torch", "triton": "Triton", "python": "Python", "numpy": "NumPy"}
HEAD = """\
# Versions

`python -m bench.tools.matrix --page` writes this page from what `make matrix` has left in `bench/results/versions/`.
Each row is an environment with exactly these versions, in which a part of the tests ran without a GPU, and the
compile gate (`{gate}`).

- **{first}** to **{last}**: tests that passed, by subject; `bench/tools/matrix/cells.py` names the files. Those that
  need a GPU are skipped, and not counted.
- **kernels**: compiled for a GPU that was not there; **spilling**: of these, kernels that spill registers.
- **sources**: hash of the package's code that ran (`tooling/sources.py`).
"""
NEVER = "not run yet"
LISTED = 20  # failures of a cell


def load(cells: Sequence[Cell], folder: Path) -> dict[str, dict]:
    """{name of the cell: its file}, for the cells that have one; ResultsError where it is another kind of file."""
    found = {}
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if path.exists():
            data = read_json(path)
            kind = (data.get("kind"), data.get("schema")) if isinstance(data, dict) else type(data).__name__
            if kind != (KIND, SCHEMA):
                raise ResultsError(f"{path}: expected kind and schema {(KIND, SCHEMA)}, got {kind}: run the cell again")
            found[cell.name] = data
    return found


def page(cells: Sequence[Cell], found: Mapping[str, dict]) -> str:
    """The Markdown; a cell without a file is a row that says so."""
    first, *_, last = SUITES
    header = ["environment", *VERSIONS.values(), *SUITES, "kernels", "spilling", "day", "sources"]
    rows = [header, ["---"] * len(header), *(_row(cell, found.get(cell.name)) for cell in cells)]
    lines = [
        HEAD.format(gate=" ".join(("python -m rir_kernels.triton.inspect", *GATE)), first=first, last=last),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    for name, title in (("errors", "What did not run"), ("failures", "Tests that failed"), ("gate", "The gate")):
        told = [f"- {cell.name}: {text}" for cell in cells for text in _told(found.get(cell.name), name)]
        lines += ["", f"## {title}", "", *told] if told else []
    return "\n".join(lines) + "\n"


def ran(result: Mapping | None) -> bool:
    """Whether the environment could be made."""
    return bool(result and result["versions"])


def well(result: Mapping) -> bool:
    """Whether everything ran, and nothing failed."""
    failed = [suite["failed"] for suite in result["suites"].values()]
    return not (result["errors"] or any(failed) or result["gate"]["failed"])


def _row(cell, result):
    name = cell.name
    if not ran(result):
        day, sources = (result["created"][:10], result["sources_hash"][:8]) if result else ("", "")
        why = "not run (below)" if result else NEVER
        versions = [getattr(cell, key) for key in VERSIONS]
        return [name, *versions, why, *[""] * (len(SUITES) + 1), day, sources]
    suites = [_suite(result["suites"].get(suite)) for suite in SUITES]
    gate = result["gate"]
    kernels = _counted(gate["kernels"] - gate["failed"], gate["failed"]) if gate else "no result"
    return [
        name, *(result["versions"][key] for key in VERSIONS), *suites, kernels, str(gate["spilling"]) if gate else "",
        result["created"][:10], result["sources_hash"][:8],
    ]  # fmt: skip


def _suite(counts):
    return _counted(counts["passed"], counts["failed"]) if counts else "no result"


def _counted(passed, failed):
    return f"{passed}, **{failed} failed**" if failed else str(passed)


def _told(result, name):
    if not result:
        return []
    if name == "errors":
        return [f"{step}: `{text}`" for step, text in result["errors"].items()]
    if name == "failures":
        failures = result["failures"]
        more = [f"and {len(failures) - LISTED} more"] if len(failures) > LISTED else []
        return [f"`{text}`" for text in failures[:LISTED]] + more
    return result["gate"].get("faults", [])
