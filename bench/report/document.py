"""A report before it is Markdown or HTML: a list of headings, paragraphs, lists, tables and pictures."""

import re
from typing import NamedTuple


class Bold(str):
    """A cell that stands out: the best of its row."""


class Heading(NamedTuple):
    text: str
    level: int = 2


class Paragraph(NamedTuple):
    text: str


class Items(NamedTuple):
    items: list[str]


class Table(NamedTuple):
    """The first `text` columns hold words, the others numbers; one with a `fold` is opened by a click on that."""

    header: list[str]
    rows: list[list[str]]
    text: int = 1
    fold: str = ""


class Picture(NamedTuple):
    """A PNG to lie beside the report as `name`, or None where it could not be drawn: the caption then says why."""

    name: str
    title: str
    caption: str
    png: bytes | None


def markdown(blocks: list) -> str:
    """The report as GitHub reads it; pictures are expected beside it."""
    return "\n\n".join(_WRITERS[type(block)](block) for block in blocks) + "\n"


def table(header: list[str], rows: list[list[str]], text: int = 1) -> str:
    """A Markdown table."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def _cell(text):
    return f"**{_plain(text)}**" if isinstance(text, Bold) else _plain(text)


def _plain(text):
    """What came from elsewhere, an error say, has no say in the layout."""
    return re.sub(r"([\\`*<|\[\]])", r"\\\1", " ".join(text.split()))


def _table(block):
    text = table(block.header, block.rows, block.text)
    return f"<details><summary>{block.fold}</summary>\n\n{text}\n\n</details>" if block.fold else text


def _picture(block):
    caption = _plain(block.caption)
    return f"![{_plain(block.title)}]({block.name})\n\n{caption}" if block.png else f"{_plain(block.title)}: {caption}"


_WRITERS = {
    Heading: lambda block: f"{'#' * block.level} {_plain(block.text)}",
    Paragraph: lambda block: _plain(block.text),
    Items: lambda block: "\n".join(f"- {_plain(item)}" for item in block.items),
    Table: _table,
    Picture: _picture,
}
