"""What commands print while they run."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False)


def say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def note(text: str) -> None:
    """Prints an explanation, which matters less than what it explains."""
    console.print(f"[dim]{escape(text)}")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows a pulsing bar during work that cannot be counted."""
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(text, total=None)
        yield


@contextmanager
def progress(title: str, total: int) -> Iterator:
    """Shows a bar; yields reach(done, text): how many of `total` are done, fractions included, and what comes next."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, text="")

        yield lambda done, text: bar.update(task, completed=done, text=escape(text))


def table(header: list[str], rows: list[list[str]], *, title: str | None = None, left: int = 1) -> None:
    """Prints a table. The first `left` columns are words, flush left; the others are numbers, flush right."""
    grid = Table(title=title and escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(header):
        grid.add_column(escape(name), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(escape, row))
    console.print(grid)
