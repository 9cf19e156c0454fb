"""The report: Markdown, PNGs, and one HTML page that holds everything."""

from pathlib import Path

from bench.report import page, plots, tables
from bench.report.document import Heading, Paragraph, Picture, markdown
from bench.report.speedup import cases, groups
from bench.schema import Results, Row


def write(results: list[Results], folder: str | Path) -> list[Path]:
    """report.md, the pictures and report.html in `folder`, which is made where it is missing.

    ValueError for no results, and for those of several devices: their figures cannot stand in one table.
    """
    blocks = build(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"report.md": markdown(blocks).encode(), "report.html": page.build(blocks).encode()}
    files |= {block.name: block.png for block in blocks if isinstance(block, Picture) and block.png}
    paths = []
    for name, content in files.items():
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    return paths


def build(results: list[Results]) -> list:
    """The report's blocks."""
    if not results:
        raise ValueError("no results to report on: run `python -m bench` first")
    names = list(dict.fromkeys(result.device.get("name", "unknown") for result in results))
    if len(names) > 1:
        raise ValueError(f"results of several devices ({', '.join(names)}): report on one at a time")
    results = sorted(results, key=lambda result: result.created)
    rows = merged(results)
    found = cases(rows)
    grouped = groups(found)
    cpu = results[0].device.get("type") == "cpu"
    blocks = [Heading(f"Benchmark: {names[0]}", 1)]
    blocks += tables.head(results, sum(len(result.rows) for result in results) - len(rows))
    blocks += tables.gates(rows)
    blocks.append(Paragraph(tables.CPU_TIMES if cpu else tables.TIMES))
    if means := tables.summary(grouped):
        blocks += [Heading("Speed-ups: geometric means, and over how many shapes"), means]
    blocks += [Heading("Figures"), *plots.pictures(found, results)]
    suite = None
    for key, own in grouped.items():
        if key[0] != suite:
            suite = key[0]
            blocks.append(Heading(suite))
        blocks += [Heading(", ".join(key[1:]), 3), *tables.group(own)]
    return blocks


def merged(results: list[Results]) -> list[Row]:
    """All rows; of those with the same key the last one."""
    return list({row.key: row for result in results for row in result.rows}.values())
