"""The table of bad inputs and faults, docs/faults.md, from docs/faults.json and the tests named after its rows.

    python -m bench.tools.faults --out docs                                         # write the page again
    python -m bench.tools.faults --out docs --junit FILE --where "CPU, interpreter" # and note where a run has seen them

A test of row 7 is called test_row_07_<what>, one of two rows test_rows_17_and_18_<what>. FILE is what pytest --junitxml
wrote; of each place the newest run stays.
"""

import argparse
import ast
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from tooling.files import save_text

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"test_rows?_(\d\d)(?:_and_(\d\d))?_\w+")
INTRODUCTION = """\
# Bad inputs and faults

What happens for each of them, and the tests that show it. `python -m bench.tools.faults --out docs` writes this page.
"Seen" is how many of a row's tests passed in a recorded run; parametrized tests count one by one, and those that need
what a machine lacks are skipped there.
"""


def tests_by_row(folder: Path) -> dict[int, list[tuple[str, str]]]:
    """{row: [(file, test)]} of all tests named test_row_NN_... below the folder, read and not imported."""
    found = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for row in rows_of(node.name) if isinstance(node, ast.FunctionDef) else ():
                found[row].append((path.relative_to(folder.parent).as_posix(), node.name))
    return dict(found)


def rows_of(test: str) -> list[int]:
    """The rows that a test's name says it is of."""
    name = NAME.match(test)
    return [int(row) for row in name.groups() if row] if name else []


def outcomes(junit: Path) -> tuple[str, dict[int, dict[str, int]]]:
    """(the day of the run, {row: {"passed": n, "skipped": n, "failed": n}}) of a JUnit file."""
    root = ElementTree.parse(junit).getroot()
    suite = root if root.tag == "testsuite" else root.find("testsuite")
    counts = defaultdict(lambda: {"passed": 0, "skipped": 0, "failed": 0})
    for case in suite.iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        for row in rows_of(case.get("name", "")):
            counts[row][outcome] += 1
    return suite.get("timestamp", "")[:10], dict(counts)


def note(rows: list[dict], junit: Path, where: str, versions: dict[str, str]) -> None:
    """Writes into the rows what the run has seen of them; a row that it had no test of keeps what it has."""
    day, counts = outcomes(junit)
    for row in rows:
        if row["row"] in counts:
            seen = {place["where"]: place for place in row.get("seen", [])}
            seen[where] = {"where": where, "day": day, **versions, **counts[row["row"]]}
            row["seen"] = [seen[place] for place in sorted(seen)]


def page(rows: list[dict], tests: dict[int, list[tuple[str, str]]]) -> str:
    """docs/faults.md."""
    lines = [INTRODUCTION, "| row | fault | behaviour | tests | last seen |", "|---|---|---|---|---|"]
    for row in rows:
        found = "<br>".join(f"[{name}](../{path})" for path, name in tests.get(row["row"], ()))
        seen = "<br>".join(map(_seen, row.get("seen", ())))
        lines.append(f"| {row['row']} | {row['fault']} | {row['behaviour']} | {found or 'none'} | {seen} |")
    return "\n".join(lines) + "\n"


def _seen(place):
    counts = ", ".join(f"{place[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed") if place[outcome])
    return f"{place['where']}, {place['day']}, torch {place['torch']}, triton {place['triton']}: {counts}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tools.faults", description="The table of bad inputs and faults."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR", help="of faults.json and faults.md")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="what a run of pytest wrote with --junitxml")
    parser.add_argument("--where", metavar="TEXT", help='where it ran, as "CPU, interpreter"')
    options = parser.parse_args(arguments)
    if (options.junit is None) != (options.where is None):
        parser.error("--junit and --where go together")
    data = options.out / "faults.json"
    rows = json.loads(data.read_text(encoding="utf-8"))
    if options.junit is not None:
        from tooling.provenance import versions

        found = versions()
        note(rows, options.junit, options.where, {name: found[name] for name in ("torch", "triton")})
        save_text(data, json.dumps(rows, indent=1) + "\n")
    save_text(options.out / "faults.md", page(rows, tests_by_row(ROOT / "tests")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
