"""python -m bench: see `python -m bench --help`."""

import sys

from tooling.console import waiting

if __name__ == "__main__":
    with waiting("PyTorch"):  # whose import takes seconds
        from bench.cli import main
    sys.exit(main(sys.argv[1:]))
