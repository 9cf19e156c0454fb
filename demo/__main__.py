"""python -m demo [--out DIR] [--data DIR]: see the package's docstring."""

import argparse
import os
import sys

# before torch is imported: threads that spin while they wait starve each other on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where anything was not equivalent."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="Fuse a network, prove it equal, report on it.")
    parser.add_argument("--out", default="out", metavar="DIR", help="for report.html and results.json (default: out)")
    parser.add_argument("--data", metavar="DIR", help="CIFAR-10 as {train,test}-*.parquet (default: 8x8 digits)")
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps of each network")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images in a step (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--impl", default="auto", help='what fuse_ is to use (default: "auto")')
    args = parser.parse_args(argv)

    from . import console, report, story, tables

    results = story.tell(args)
    console.heading("Result")
    for failure in results["failures"]:
        console.verdict(False, failure)
    page, data = report.write(results, args.out)
    console.say(f"{tables.closing(results)}; open {page} (plain numbers: {data})")
    return 0 if results["passed"] else 1


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":  # the compile table starts processes, which import this file
    sys.exit(main())
