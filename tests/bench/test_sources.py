"""The hash of what a figure depends on: what changes it, and what must not."""

import ast
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from tooling import sources
from tooling.sources import KINDS, PACKAGE, Kind, sources_hash
from tooling.syntax import read_module

GPU, CPU = {"type": "cuda", "name": "Made-up GPU"}, {"type": "cpu", "name": "Made-up CPU"}
FIGURES = {
    "kernels": ("kernels", GPU), "layers": ("layers", GPU), "models": ("models", GPU), "memory": ("memory", CPU),
    "cpu": ("training", CPU), "cpu models": ("models", CPU),
}  # fmt: skip


@pytest.fixture
def package(tmp_path):
    """A copy of the package's sources."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "rir_kernels", ignore=shutil.ignore_patterns("__pycache__")))


@functools.cache
def present():
    return hashes(PACKAGE)


def hashes(package):
    return {name: sources_hash(kind, device, package) for name, (kind, device) in FIGURES.items()}


def changed(package):
    """The figures whose hash is not that of the package as it is."""
    return {name for name, found in hashes(package).items() if found != present()[name]}


def test_every_kind_on_every_device():
    found = [sources_hash(kind, device) for kind in KINDS for device in (GPU, CPU)]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in found)
    assert present()["memory"] == present()["models"]  # bytes of memory are those of a GPU's networks
    assert len(set(present().values())) == len(FIGURES) - 1
    with pytest.raises(ValueError, match="expected a device with a type, one of cuda, cpu, got 'cuda'"):
        sources_hash("layers", "cuda")


EVERY_GPU = {"kernels", "layers", "models", "memory"}
DEPEND = {
    "triton/kernels/conv.py": EVERY_GPU,
    "triton/tiling/conv_tiles.py": EVERY_GPU,
    "triton/tiling/wgrad_cost.py": EVERY_GPU,
    "triton/launch/batchnorm.py": EVERY_GPU,
    "triton/plan/plan.py": EVERY_GPU - {"kernels"},
    "backends/cudnn.py": {*FIGURES},
    "autograd/recomputation.py": {*FIGURES} - {"kernels"},
    "dispatch/operation.py": {*FIGURES} - {"kernels"},
    "functional.py": set(),
    "backends/aten.py": {*FIGURES} - {"kernels"},
    "surgery/fuse.py": {"models", "memory", "cpu models"},
    "surgery/patterns/timm.py": {"models", "memory", "cpu models"},
    "reference/modules.py": set(),
    "equivalence/compare.py": set(),
    "triton/inspect.py": set(),
    "env.py": set(),
    "__init__.py": set(),
}


def test_which_figures_depend_on_a_module(package):
    found = {}
    for name in DEPEND:
        source = (package / name).read_text()
        (package / name).write_text(f"{source}\nUNHEARD_OF = 1\n")
        found[name] = changed(package)
        (package / name).write_text(source)
    assert found == DEPEND


def rewritten(path, change):
    """The module as ast.unparse writes it, without comments and blank lines and in other lines, after change(tree)."""
    tree = ast.parse(path.read_text())
    change(tree)
    path.write_text(ast.unparse(tree) + "\n")


def first(tree, kind, wanted=lambda node: True):
    return next(node for node in ast.walk(tree) if isinstance(node, kind) and wanted(node))


def new_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            if ast.get_docstring(node) is not None:
                node.body.pop(0)
            else:
                node.body.insert(0, ast.Expr(ast.Constant("It had none.")))


def no_mask(tree):
    load = first(tree, ast.Call, lambda call: any(keyword.arg == "mask" for keyword in call.keywords))
    load.keywords = [keyword for keyword in load.keywords if keyword.arg != "mask"]


def larger(tree):
    first(tree, ast.Constant, lambda node: type(node.value) in (int, float)).value += 1


def test_comments_docstrings_and_formatting_decide_nothing(package):
    for path in (package / "triton").rglob("*.py"):
        path.write_text(f"# a comment\n\n\n{path.read_text()}\n# and one more\n")
    for name in (
        "triton/kernels/batchnorm.py",
        "triton/tiling/conv_cost.py",
        "autograd/registered_op.py",
        "surgery/program.py",
    ):
        rewritten(package / name, new_docstrings)
    assert changed(package) == set()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("triton/kernels/batchnorm.py", no_mask),
        ("triton/kernels/conv_loops.py", larger),
        ("triton/tiling/conv_cost.py", larger),
    ],
)
def test_what_a_kernel_or_a_rule_does_decides(package, name, change):
    rewritten(package / name, change)
    assert changed(package) == EVERY_GPU


def test_paths_decide_nothing(package, monkeypatch):
    """Another folder for the launchers, and other names for two files, one of which is spoken of in code."""
    (package / "triton" / "launch").rename(package / "start")
    (package / "backends" / "aten.py").rename(package / "backends" / "operators.py")
    (package / "triton" / "kernels" / "conv.py").rename(package / "triton" / "kernels" / "convolution.py")
    for path in package.rglob("*.py"):
        text = path.read_text().replace("rir_kernels.triton.launch", "rir_kernels.start")
        text = text.replace("triton.kernels.conv import", "triton.kernels.convolution import")
        if path.name in ("composed.py", "operation.py", "sync_statistics.py"):
            text = re.sub(r"(?<!ops\.)\baten\b", "operators", text)
        path.write_text(text)
    before = present()
    for kind, (entries, device) in list(KINDS.items()):
        moved = tuple(entry.replace("triton.launch", "start") for entry in entries)
        monkeypatch.setitem(KINDS, kind, Kind(moved, device))
    monkeypatch.setitem(sources._LEFT_OUT, "cpu", (*sources._LEFT_OUT["cpu"], "rir_kernels.start"))
    assert hashes(package) == before


def test_measured_tiles(package):
    def measured(tile, ms, name="made-up-gpu", **more):
        entry = {"problem": {"c": 96}, "tile": tile, "ms": ms} | more
        path = package / "triton" / "tiles" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"schema": 1, "created": ms, "tiles": [entry], "wgrad_tiles": []}))
        return hashes(package)

    before, first, slower = hashes(package), measured([1, 2], 0.1), measured([1, 2], 0.2)
    other, elsewhere = measured([2, 1], 0.2), measured([1, 2], 0.1, name="another-gpu")
    # "memory" is of no GPU in particular, and tiles decide no bytes
    assert {name for name in before if before[name] != first[name]} == {"kernels", "layers", "models"}
    assert slower == first
    assert {name for name in before if other[name] != first[name]} == {"kernels", "layers", "models"}
    assert elsewhere == other
    (package / "triton" / "tiles" / "made-up-gpu.json").write_text("[")
    assert hashes(package) == before  # the kernels ignore it too


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """The hash of a made-up package whose figures begin at p.main, written as {path: source}."""
    monkeypatch.setitem(KINDS, "layers", Kind(("p.main",)))

    def hashed(files):
        root = tmp_path / str(len([*tmp_path.iterdir()])) / "p"
        for name, source in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return sources_hash("layers", GPU, root)

    return hashed


MAIN = "def f(): return g() - h() * c.k()"
PLAIN = {
    "__init__.py": "from .main import f",
    "main.py": "from .a import g\nfrom .b import g as h\nfrom . import c\n" + MAIN,
    "a.py": "def g(): return 1",
    "b.py": "def g(): return 2",
    "c.py": "def k():\n    from p.main import f\n    return f",
}


@pytest.mark.parametrize(
    ("counts", "files"),
    [
        (False, {"__init__.py": "from .main import f\nVERSION = 2"}),  # nothing is taken from it
        (False, {"d.py": "nobody = 'imports it'"}),
        (False, {"main.py": "from p import c\nfrom p.b import g as h\nfrom p.a import g\n" + MAIN}),
        (False, {"main.py": "import p.c as d\nfrom p.b import g as h\nfrom .a import g\n" + MAIN.replace("c.", "d.")}),
        (True, {"main.py": PLAIN["main.py"].replace(".a", ".x").replace(".b", ".a").replace(".x", ".b")}),
        (True, {"main.py": PLAIN["main.py"] + "\nfrom . import d", "d.py": "import os"}),
        (True, {"main.py": PLAIN["main.py"] + "\nfrom . import VERSION", "__init__.py": "VERSION = 1"}),
        (True, {"c.py": PLAIN["c.py"].replace("return f", "return f()")}),
    ],
)  # fmt: skip
def test_imports(made_up, counts, files):
    assert (made_up(PLAIN | files) != made_up(PLAIN)) is counts


def test_modules_that_are_imported_late(made_up):
    def hashed(name, late):
        return made_up({"main.py": f"import importlib\nm = importlib.import_module('p.{name}')", f"{name}.py": late})

    assert hashed("late", "x = 1") == hashed("later", "x = 1") != hashed("late", "x = 2")


@pytest.mark.parametrize(
    ("main", "message"),
    [
        ("import importlib\nimportlib.import_module(f'p.{name}')", r"p\.main, line 2: import_module with a name"),
        ("import importlib\nimportlib.import_module('.a', 'p')", "pass the full dotted name as a literal"),
        ("from .nowhere import f", r"there is no module p\.nowhere"),
    ],
)  # fmt: skip
def test_imports_that_cannot_be_followed(made_up, main, message):
    with pytest.raises(ValueError, match=message):
        made_up({"main.py": main})


def test_every_python_reads_the_same():
    """Python 3.10, 3.11, 3.12 and 3.13 gave this hash, although their trees have different fields."""
    source = b'''
"""A docstring."""
from .other import name
class A:
    def f(self, x: int = -1, *, y=f"{1!r:>{2}}{'a'}b" "c", z=f"{2 = }") -> None:
        "a docstring"
        match x:
            case [1, *_]: return {**y, "\xc3\xa4": 1e-5}
'''
    module = read_module("p.main", source, False, frozenset({"p.other"}))
    digest = hashlib.sha256(module.text(str.upper).encode()).hexdigest()
    assert digest == "60a37bf9c9f80a4298b3d5dbb9fd4601e1ba18cc7b6ccbc8a2c2a616581a8c89"
