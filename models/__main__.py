"""python -m models [--num-classes N] [--image-size N]: the networks and what they cost."""

import argparse

from rich.console import Console
from rich.table import Table

from .zoo import cost, list_models


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models", description="The networks and what they cost.")
    parser.add_argument("--num-classes", type=_positive, default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--image-size", type=_positive, default=32, metavar="N", help="pixels a side (default: 32)")
    args = parser.parse_args(argv)
    table = Table("name", "parameters", "multiply-adds", box=None, pad_edge=False, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in list_models():
        found = cost(name, args.num_classes, image_size=args.image_size)
        table.add_row(name, f"{found.parameters:,}", f"{found.macs:,}")
    console = Console(highlight=False)
    console.print(table)
    size = f"{args.image_size}x{args.image_size}"
    console.print(f'[dim]{args.num_classes} classes, one image of 3x{size}; models.create("rir18_wide") makes one')


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    main()
