"""python -m demo [--out DIR] [--data PATH]: see the package's docstring."""

import argparse
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if anything was not equivalent."""
    _set_environment()
    from rir_kernels.common.arguments import IMPLS

    parser = argparse.ArgumentParser(prog="python -m demo", description="Fuse a network, prove it equal, report on it.")
    parser.add_argument("--out", default="out", metavar="DIR", help="for report.html and results.json (default: out)")
    known = "CIFAR as parquet files or in the binary version, or a folder of images (default: 8x8 digits)"
    parser.add_argument("--data", metavar="PATH", help=known)
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps of each network")
    parser.add_argument("--batch", type=_positive, default=64, metavar="N", help="images in a step (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--impl", default="auto", choices=IMPLS, help="what fuse_ is to use (default: auto)")
    args = parser.parse_args(argv)
    from models.data import DataError
    from tooling.console import say

    from . import console, report, story, tables

    try:
        results = story.tell(args)
    except DataError as error:
        parser.error(f"--data: {error}")
    page, numbers = report.write(results, args.out)
    console.heading("Result")
    for failure in results["failures"]:
        console.verdict(False, failure)
    say(f"{tables.closing(results)}\nopen {page} (its numbers: {numbers})")
    return 0 if results["passed"] else 1


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _set_environment():
    """What has to be known before torch and triton are imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait spinning starve those of other programs
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


if __name__ == "__main__":
    sys.exit(main())
