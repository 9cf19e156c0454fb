"""What is printed while a suite runs."""

from rich.markup import escape
from rich.table import Table

from bench.schema import Row
from tooling.console import console


def show(title: str, rows: list[Row]) -> None:
    """Prints the rows of one case: a line for each implementation, with its gate and its time in every mode."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    table = Table(
        title=escape(f"{title}, milliseconds"), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("", min_width=20)
    table.add_column("gate")
    for mode in modes:
        table.add_column(mode, justify="right", min_width=9)
    for impl in dict.fromkeys(row.impl for row in rows):
        own = [row for row in rows if row.impl == impl]
        gate = "[green]passed[/]" if all(row.passed for row in own) else "[red]REFUSED[/]"
        table.add_row(impl, gate, *(_time([row for row in own if row.mode == mode]) for mode in modes))
    console.print(table)
    for impl, error in dict.fromkeys((row.impl, row.error) for row in rows if row.error):
        console.print(f"  [red]{impl}[/]: {escape(error)}", soft_wrap=True)


def _time(rows):
    """The CUDA graph with a warm cache, where there is one, else eager."""
    timed = [row for row in rows if row.ms_median is not None and row.l2 == "warm"]
    best = max(timed, key=lambda row: row.graph, default=None)
    return "-" if best is None else f"{best.ms_median:.4g}"
