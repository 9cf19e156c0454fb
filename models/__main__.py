"""python -m models [--num-classes N] [--image-size N]: the networks and what they cost."""

import argparse

from tooling import console

from .zoo import cost, list_models


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models", description="The networks and what they cost.")
    parser.add_argument("--num-classes", type=_positive, default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--image-size", type=_positive, default=32, metavar="N", help="pixels a side (default: 32)")
    args = parser.parse_args(argv)
    rows = []
    for name in list_models():
        found = cost(name, args.num_classes, image_size=args.image_size)
        rows.append([name, f"{found.parameters:,}", f"{found.macs:,}"])
    console.table(["name", "parameters", "multiply-adds"], rows)
    size = f"{args.image_size}x{args.image_size}"
    console.note(f'{args.num_classes} classes, one image of 3x{size}; models.create("rir18_wide") makes one')


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    main()
