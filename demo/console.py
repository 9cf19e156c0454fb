"""What is printed while the demo runs."""

from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(highlight=False)


def heading(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left", characters="─")


def say(text: str) -> None:
    console.print(escape(text))


def note(text: str) -> None:
    """An explanation, less important than what is measured."""
    console.print(f"[dim]{escape(text)}")


def verdict(passed: bool, text: str, detail: str = "") -> None:
    mark = "[bold green]yes[/]" if passed else "[bold red]NO [/]"
    console.print(f"  {mark}  {escape(text)}" + (f" [dim]({escape(detail)})" if detail else ""))


def table(header: list[str], rows: list[list[str]], *, left: int = 1) -> None:
    """The first `left` columns hold words, the others numbers, flush right."""
    grid = Table(*header, box=None, pad_edge=False, header_style="dim")
    for column in grid.columns:
        column.overflow = "fold"
    for column in grid.columns[left:]:
        column.justify = "right"
    for row in rows:
        grid.add_row(*map(escape, row))
    console.print(grid)


@contextmanager
def steps(label: str, total: int | None):
    """A progress bar, or a clock where `total` is None; yields advance(text)."""
    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn(), MofNCompleteColumn()] if total else []
    columns += [TimeElapsedColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)
