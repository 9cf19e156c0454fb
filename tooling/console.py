"""What is printed while a benchmark runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .results import Row

console = Console(highlight=False)


def say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A bar that pulses, for what cannot be counted."""
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(text, total=None)
        yield


@contextmanager
def progress(title: str, total: int) -> Iterator:
    """A bar; yields reach(done, text): of `total` so many are done, parts included, and text says what comes next."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, text="")

        yield lambda done, text: bar.update(task, completed=done, text=escape(text))


def show(title: str, rows: list[Row]) -> None:
    """The rows of one case: a line for each implementation, its gate, and its time in every mode."""
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


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Cells as they are, words in the first column and numbers in the others."""
    grid = Table(title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(header):
        grid.add_column(escape(name), justify="right" if index else "left")
    for row in rows:
        grid.add_row(*map(escape, row))
    console.print(grid)


def _time(rows):
    """The CUDA graph with a warm cache, where there is one, else eager."""
    timed = [row for row in rows if row.ms_median is not None and row.l2 == "warm"]
    best = max(timed, key=lambda row: row.graph, default=None)
    return "-" if best is None else f"{best.ms_median:.4g}"
