"""A deliberate fault, and what makes a table of them sound."""

import ast
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """`file` with `new` in place of `old`; `tests` are the arguments of pytest that must notice it.

    They run in Triton's interpreter. Where `unseen` names tests that pass there all the same, it is a fault of the
    compiled path: `tests` run what Triton compiles, on the emulated GPU.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    unseen: tuple[str, ...] = ()

    @property
    def emulated(self) -> bool:
        return bool(self.unseen)

    def source(self, root: Path) -> str:
        """The file's text with the fault in it. ValueError where `old` is not there exactly once."""
        text = (root / self.file).read_text()
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} is in {self.file} {found} times, expected once")
        return text.replace(self.old, self.new)


def problems(mutants: list[Mutant], root: Path) -> list[str]:
    """What is wrong with the table, a line each; nothing has to be run to know."""
    wrong = [f"{name}: two mutants of that name" for name, n in Counter(m.name for m in mutants).items() if n > 1]
    for mutant in mutants:
        if mutant.old == mutant.new:
            wrong.append(f"{mutant.name}: a mutant that changes no source is an error")
        try:
            ast.parse(mutant.source(root))
        except ValueError as error:
            wrong.append(str(error))
        except (OSError, SyntaxError) as error:
            wrong.append(f"{mutant.name}: {error}")
        wrong += [f"{mutant.name}: {missing}" for missing in _missing_tests(mutant.tests + mutant.unseen, root)]
    return wrong


def _missing_tests(tests, root):
    """Files and functions that a selection names and that are not there."""
    for test in tests:
        path, _, function = test.split("[")[0].partition("::")
        if not (root / path).is_file():
            yield f"no file {path}"
        elif function and not re.search(rf"^def {function}\(", (root / path).read_text(), re.MULTILINE):
            yield f"no {function} in {path}"
