"""The report as one HTML page that needs nothing from elsewhere."""

import base64
from html import escape
from pathlib import Path

from bench.report.document import Bold, Heading, Items, Paragraph, Picture, Table

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def build(blocks: list) -> str:
    """The page; its title is that of the first block, a heading."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    body = "\n".join(_WRITERS[type(block)](block) for block in blocks)
    return PAGE.format(title=escape(blocks[0].text), style=style, body=body)


def _heading(block):
    return f"<h{block.level}>{escape(block.text)}</h{block.level}>"


def _items(block):
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"


def _table(block):
    def line(tag, cells):
        classes = (' class="number"' if i >= block.text else "" for i in range(len(cells)))
        return "".join(f"<{tag}{c}>{_cell(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in block.rows)
    head = f"<thead><tr>{line('th', block.header)}</tr></thead>"
    text = f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
    return f"<details><summary>{escape(block.fold)}</summary>{text}</details>" if block.fold else text


def _cell(text):
    return f"<b>{escape(text)}</b>" if isinstance(text, Bold) else escape(text)


def _picture(block):
    if block.png is None:
        return f"<p>{escape(block.title)}: {escape(block.caption)}</p>"
    data = base64.b64encode(block.png).decode()
    image = f'<img alt="{escape(block.title)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(block.caption)}</figcaption></figure>"


_WRITERS = {
    Heading: _heading,
    Paragraph: lambda block: f"<p>{escape(block.text)}</p>",
    Items: _items,
    Table: _table,
    Picture: _picture,
}
