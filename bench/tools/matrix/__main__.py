"""The command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.schema import ResultsError
from bench.tools.matrix import document
from bench.tools.matrix.cells import CELLS, Cell
from bench.tools.matrix.run import run_cell
from tooling.files import save_json, save_text
from tooling.sources import sources_hash

ROOT = Path(__file__).resolve().parents[3]
RESULTS, DOCS = ROOT / "bench" / "results" / "versions", ROOT / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 where everything that was run now passed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        named = dict(pair.split("=", 1) for pair in options.python)
    except ValueError:
        parser.error(f"--python: expected VERSION=PATH such as 3.12=/opt/bin/python, got {' '.join(options.python)}")
    if options.list:
        print(json.dumps([{"name": cell.name, "python": cell.python} for cell in CELLS]))
        return 0
    try:
        cells = [] if options.page else _chosen(options.only, options.out)
        failed = _run(cells, options, named)
        save_text(options.docs / document.PAGE, document.page(CELLS, document.load(CELLS, options.out)))
    except (ResultsError, ValueError) as error:
        parser.error(str(error))
    return 1 if failed else 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.tools.matrix",
        description="Runs a part of the tests and the compile gate under other versions, one environment after the "
        "other. Each is made in a temporary folder and removed after; with a CUDA build of torch it takes several GB. "
        "So does pip's cache (`pip cache dir`), which keeps what was downloaded.",
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="cells, separated by commas: run these, though their results "
        "are there; default: those without results of the present sources",
    )  # fmt: skip
    parser.add_argument(
        "--venvs", type=Path, metavar="DIR", help="where environments are made; default: a temporary folder"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="results; default: bench/results/versions"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="of versions.md; default: docs")
    parser.add_argument(
        "--python", action="append", default=[], metavar="VERSION=PATH", help="an interpreter; default: what PATH and "
        "pyenv have",
    )  # fmt: skip
    parser.add_argument("--page", action="store_true", help="run nothing, write versions.md from the results")
    parser.add_argument("--list", action="store_true", help="print the cells and their Pythons as JSON")
    return parser


def _chosen(only: Sequence[str] | None, out: Path) -> list[Cell]:
    """The cells to run; ValueError for a name that no cell has."""
    if only is None:
        found, now = document.load(CELLS, out), sources_hash("matrix")
        return [cell for cell in CELLS if not _current(found.get(cell.name), cell, now)]
    names = [name for text in only for name in text.split(",") if name]
    known = [cell.name for cell in CELLS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no cell {', '.join(unknown)}: expected some of {', '.join(known)}")
    return [cell for cell in CELLS if cell.name in names]


def _current(result, cell, now):
    """Whether the cell ran with these versions and sources. What could not be installed is tried again."""
    asked = {name: getattr(cell, name) for name in ("name", "torch", "triton", "python", "numpy")}
    return document.ran(result) and (result["cell"], result["sources_hash"]) == (asked, now)


def _run(cells, options, named):
    """The names of the cells that did not pass."""
    from tooling import console

    failed, now = [], sources_hash("matrix")
    with console.progress("cells", len(cells)) as reach:
        for done, cell in enumerate(cells):
            steps = []

            def tell(step, line, done=done, cell=cell, steps=steps):
                if step not in steps:
                    steps.append(step)
                    console.say(f"{cell.name}: {step}")
                reach(done, f"{cell.name}, {step}: {line.strip()[:60]}")

            result = run_cell(cell, now, options.venvs, named, tell)
            save_json(options.out / f"{cell.name}.json", result)
            failed += [] if document.well(result) else [cell.name]
            console.say(f"{cell.name}: {_summary(result)}")
    return failed


def _summary(result):
    if result["errors"]:
        return "; ".join(f"{step}: {text}" for step, text in result["errors"].items())
    passed, failed = (sum(suite[key] for suite in result["suites"].values()) for key in ("passed", "failed"))
    gate, seconds = result["gate"], sum(result["seconds"].values())
    return (
        f"{passed} tests passed, {failed} failed; {gate['kernels']} kernels compiled, {gate['failed']} failed; "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
