"""python -m tests.mutants: breaks the kernels on purpose, one fault at a time, and counts those that the tests see."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .mutant import problems
from .runner import run_all
from .table import MUTANTS

ROOT = Path(__file__).parents[2]
COLOURS = {"passed": "green", "killed": "green", "SURVIVED": "red", "error": "magenta"}
console = Console(highlight=False)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone")
    parser.add_argument("--list", action="store_true", help="the mutants and their tests; nothing is run")
    parser.add_argument("--workers", type=int, default=2, help="processes at once (default: 2)")
    arguments = parser.parse_args(argv)

    if unknown := set(arguments.only or ()) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant is named {', '.join(sorted(unknown))}: see --list")
    if arguments.workers < 1:
        parser.error(f"--workers must be 1 or more, got {arguments.workers}")
    if wrong := problems(MUTANTS, ROOT):
        for line in wrong:
            console.print(f"[red]{escape(line)}[/]", soft_wrap=True)
        return 2
    mutants = [mutant for mutant in MUTANTS if not arguments.only or mutant.name in arguments.only]
    if arguments.list:
        for mutant in mutants:
            where = "emulated" if mutant.emulated else "interpreted"
            console.print(escape(f"{mutant.name}  {where}  {mutant.file}  {' '.join(mutant.tests)}"), soft_wrap=True)
        return 0

    width = max(len(mutant.name) for mutant in mutants)

    def report(mutant, verdict, text, seconds):
        name = mutant.name if mutant else "no fault"
        line = f"[{COLOURS[verdict]}]{verdict:8}[/] {escape(f'{name:{width}} {seconds:5.1f} s  {text}'.rstrip())}"
        console.print(line, soft_wrap=True)

    begin = time.monotonic()
    killed = run_all(ROOT, mutants, arguments.workers, report)
    console.print(f"{time.monotonic() - begin:.0f} s")
    console.print(f"killed {killed} of {len(mutants)}")
    return 0 if killed == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
