"""python -m tests.soak --minutes N --out DIR: a long life at random, in which nothing may go wrong.

Rounds until the time is over. In each a network is trained by the real command, which is killed, stopped, continued and
evaluated at random (command.py), and others live in this process: trained, evaluated, fused, unfused, copied, saved and
loaded in any order (life.py); where no GPU is, one of them with the kernels in Triton's interpreter. After each round
this process must hold no more memory, files or threads than before (resources.py). DIR/soak.jsonl has a line an event;
the first fault ends it, with a command that repeats its round.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from . import command, life, resources

LIVES = 3


class Log:
    """Events, as lines of a file and as counts."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.counts, self.begin = path, collections.Counter(), time.monotonic()
        path.write_text("")

    def __call__(self, event: str, **facts):
        self.counts[event] += 1
        line = {"seconds": round(time.monotonic() - self.begin, 1), "event": event, **facts}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main(argv=None) -> int:
    """The exit status: 0 where nothing went wrong, 1 after a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, metavar="N", help="begin no round after these")
    parser.add_argument("--out", default="out/soak", metavar="DIR")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--impl", default="auto", choices=("auto", "torch", "hybrid", "triton"))
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--round", type=int, default=None, metavar="N", help="this round alone")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    log = Log(Path(args.out) / "soak.jsonl")
    end = time.monotonic() + 60 * args.minutes
    watch, number = resources.Watch(torch.device(args.device)), args.round or 0
    while True:
        chance = random.Random(f"{seed} {number}")  # a round alone is the same as among others
        log("round", number=number, seed=seed)
        try:
            with tempfile.TemporaryDirectory(prefix="soak-") as folder:
                command.live(chance, Path(folder), log, device=args.device, impl=args.impl)
            for _ in range(LIVES):
                life.live(chance, log, device=args.device, impl=args.impl, events=30)
            if args.device == "cpu":  # the kernels too, though the interpreter is slow
                life.live(chance, log, device="cpu", impl="triton", events=12)
            log("resources", **watch.check())
        except Exception as error:
            log("fault", error=f"{type(error).__name__}: {error}")
            traceback.print_exc()
            print(
                f"again: python -m tests.soak --seed {seed} --round {number} --device {args.device} --impl {args.impl}"
            )
            return 1
        number += 1
        if args.round is not None or time.monotonic() >= end:
            break
    counts = ", ".join(f"{count} {event}" for event, count in log.counts.most_common())
    print(f"{(time.monotonic() - log.begin) / 60:.1f} minutes, seed {seed}: {counts}; no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
