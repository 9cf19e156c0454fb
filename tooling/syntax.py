"""A module as text that says what it does and no more: no comments, docstrings or formatting, no names of files.

Where it refers to another module of its package, that is marked, so that something other than a path can stand there.
"""

import ast
import functools
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple


class Own(str):
    """The dotted name of a module of the same package, where the module is meant."""


class Module(NamedTuple):
    """What a module does, in pieces; `links` are names that it takes out of other modules of its package."""

    pieces: tuple[str, ...]
    links: tuple[tuple[Own, str], ...]
    reached: frozenset[str]

    def text(self, told_by: Callable[[str], str]) -> str:
        """All of it, with told_by(dotted name) in place of modules of the same package."""
        links = sorted(f"{told_by(module)}: {names}" for module, names in self.links)
        return " ".join([*(told_by(p) if isinstance(p, Own) else p for p in self.pieces), *links])


@functools.cache
def read_module(name: str, source: bytes, is_package: bool, known: frozenset[str]) -> Module:
    """The module of that dotted name; known: all modules of its package.

    Every Python that can parse the source gives the same result. ValueError for an import that cannot be followed.
    """
    tree = ast.parse(source)
    imports = _Imports(name, is_package, known)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.note(node)
    pieces = []
    for is_own, run in groupby(_pieces(tree, imports, []), lambda piece: isinstance(piece, Own)):
        run = list(run)
        pieces += run if is_own else [" ".join(run)]
    return Module(tuple(pieces), tuple(imports.links), frozenset(imports.reached))


class _Imports:
    """What a module imports from its own package."""

    def __init__(self, name, is_package, known):
        self.name, self._known = name, known
        self._parents = name.split(".")[: None if is_package else -1]
        self.modules = {}  # by the names that they have in this one
        self.links, self.reached = set(), set()

    def note(self, node):
        for alias in node.names:
            here = alias.asname or alias.name
            source = self._source(node, alias)
            if source is None:
                continue
            module = f"{source}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            if module in self._known:
                self.modules[here] = self.reach(module)
            else:
                self.links.add((self.reach(source), f"{alias.name} as {here}"))

    def are_all_own(self, node):
        return all(self._source(node, alias) is not None for alias in node.names)

    def _source(self, node, alias):
        """The dotted name that an import names, None outside the package."""
        name = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        if level := getattr(node, "level", 0):
            return ".".join([*self._parents[: len(self._parents) + 1 - level], *([name] if name else [])])
        return name if self.is_own(name) else None

    def is_own(self, name):
        return name.split(".")[0] == self.name.split(".")[0]

    def reach(self, name):
        self.reached.add(name)
        return Own(name)


def _pieces(value, imports, into) -> list[str]:
    """The pieces of a node, a list or a constant, added to the list `into`, which is returned.

    Empty fields are left out: which there are differs by Python.
    """
    if isinstance(value, ast.Name) and value.id in imports.modules:
        into.append(imports.modules[value.id])
    elif isinstance(value, ast.Call) and _last_name(value.func) == "import_module":
        into += "import_module", _imported(value, imports)
    elif isinstance(value, ast.AST):
        into.append(f"{type(value).__name__}(")
        for field, item in ast.iter_fields(value):
            if isinstance(item, list):
                item = [one for one in item if not _does_nothing(one, value, imports)] or None
            if item is not None:
                into.append(field)
                _pieces(item, imports, into)
        into.append(")")
    elif isinstance(value, list):
        into.append("[")
        for item in value:
            _pieces(item, imports, into)
        into.append("]")
    else:
        into.append(f"{type(value).__name__} {value!a}")
    return into


def _does_nothing(node, parent, imports):
    """Docstrings and other bare constants, `pass`, and imports of the package's own, which are links."""
    if isinstance(parent, ast.JoinedStr):  # Python 3.12.0 and 3.12.1 end some formats with an empty text
        return isinstance(node, ast.Constant) and node.value == ""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return imports.are_all_own(node)
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _imported(call, imports):
    name = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
    if not isinstance(name, str) or name.startswith("."):
        raise ValueError(
            f"{imports.name}, line {call.lineno}: import_module with a name that is not written out cannot be "
            "followed: pass the full dotted name as a literal"
        )
    return imports.reach(name) if imports.is_own(name) else name


def _last_name(function):
    return getattr(function, "attr", getattr(function, "id", None))
