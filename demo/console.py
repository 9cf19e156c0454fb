"""What is printed while the demo runs, apart from what all commands print (`tooling.console`)."""

import itertools
from contextlib import contextmanager

from rich.markup import escape

from tooling.console import console, progress


def heading(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left", characters="─")


def verdict(passed: bool, text: str, detail: str = "") -> None:
    mark = "[bold green]yes[/]" if passed else "[bold red]NO [/]"
    console.print(f"  {mark}  {escape(text)}" + (f" [dim]({escape(detail)})" if detail else ""))


@contextmanager
def steps(label: str, total: int):
    """Shows a bar; yields advance(text)."""
    with progress(label, total) as reach:
        done = itertools.count(1)
        yield lambda text="": reach(next(done), text)
