"""Tables that print as text and render in a notebook."""

import dataclasses
import html
from collections.abc import Iterable, Iterator, Sequence

THE_MODEL = "the model itself"  # shown for an empty name


class Table(list):
    """A list of `kind`, a dataclass, that prints as a table: one row per item, one column per field."""

    kind: type

    def headline(self) -> str:
        """The line above the table."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join([self.headline(), *(["", *aligned(self._lines())] if self else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.headline())}</p>{html_table(self._lines()) if self else ''}"

    def _lines(self):
        names = [field.name for field in dataclasses.fields(self.kind)]
        return [names, *([_cell(name, getattr(item, name)) for name in names] for item in self)]


def _cell(name, value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"({THE_MODEL})" if name == "name" and not value else value


def aligned(lines: Sequence[Sequence[str]], right: Iterable[int] = ()) -> Iterator[str]:
    """Yields the lines, header first, aligned in columns; `right`: indices of the right-aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def html_table(lines: Sequence[Sequence[str]], failed: Sequence[bool] = ()) -> str:
    """Renders the lines as HTML for a notebook; failed: which of the lines below the header are red."""
    header, *rows = lines
    failed = [*failed, *[False] * (len(rows) - len(failed))]
    red = ' style="color: #c00"'
    body = "".join(f"<tr{red * fail}>{_html_cells('td', row)}</tr>" for row, fail in zip(rows, failed, strict=True))
    return f"<table><thead><tr>{_html_cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def _html_cells(tag, cells):
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
