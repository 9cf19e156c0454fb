"""A folder of the package imports only from those below it in CONTRIBUTING's picture: the path of a call."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rir_kernels"
TOP = {"__init__", "__main__"}  # they show what lies below, and nothing imports them
# the lowest first
TRITON = ["shapes", "barriers", "kernels", "tiling", "launch", "plan", "inspect", "jobs", "compile_worker"]


def picture():
    """The rows of the picture, the lowest first: names of folders and modules."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## The path of a call")[2].split("```")[1]
    return [line.split("   ")[0].split() for line in reversed(text.strip("\n").splitlines())]


# of the checkout, the lowest first
FOLDERS = ["rir_kernels", "tooling", "models", "bench", "demo"]


def modules():
    """Path by name: "dispatch.choose", and "surgery" for its __init__."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = path
    return found


def imported(path):
    """The names of all that a module imports, late imports and importlib.import_module("...") too."""
    within = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*within[: len(within) + 1 - node.level], *([node.module] if node.module else [])]
            base = base if node.level else [node.module]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


@pytest.fixture(scope="module")
def arrows():
    """(module, module that it imports)"""
    known, found = modules(), set()
    for name, path in known.items():
        for full in imported(path):
            parts = full.split(".")
            if parts[0] == "rir_kernels":
                ends = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
                found.add((name, next((end for end in ends if end in known), "__init__")))
    assert len(found) > 300
    return sorted((a, b) for a, b in found if a != b and not a.startswith("__"))


def test_no_arrow_goes_up_or_sideways(arrows):
    rows = picture()
    rank = {name: number for number, row in enumerate(rows) for name in row}
    assert set(rank) == {name.partition(".")[0] for name in modules()} - TOP
    pairs = {(a.partition(".")[0], b.partition(".")[0]) for a, b in arrows}
    assert sorted((a, b) for a, b in pairs if a != b and rank[a] <= rank.get(b, len(rows))) == []


def test_nor_within_triton(arrows):
    inside = [(a.split(".")[1:2], b.split(".")[1:2]) for a, b in arrows if a[:7] == b[:7] == "triton."]
    rank = {name: number for number, name in enumerate(TRITON)}
    assert [(a, b) for (a,), (b,) in inside if a != b and rank[a] <= rank[b]] == []


def test_no_cycle_of_modules(arrows):
    below: dict[str, set[str]] = {}
    for a, b in arrows:
        below.setdefault(a, set()).add(b)
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(below.get(name, ())):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(below):
        visit(name, [])


def test_only_triton_and_backends_import_kernels_at_once():
    """So the package is imported without Triton, and without a GPU."""
    for name, path in modules().items():
        if name.partition(".")[0] not in ("triton", "backends"):
            found = [node.module or "" for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
            assert not [module for module in found if "triton" in module.split(".")], name


def test_folders_of_the_checkout():
    """bench measures models, and demo shows both; what they have in common is in tooling."""
    for number, folder in enumerate(FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            above = {name for full in imported(path) if (name := full.partition(".")[0]) in FOLDERS[number + 1 :]}
            assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"
