"""python -m rir_kernels [--json]: the environment, for a bug report."""

import argparse
import json

from .env import env_report


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rir_kernels", description="Print the environment for a bug report."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    report = env_report()
    print(json.dumps(report, indent=2) if options.json else report)


if __name__ == "__main__":
    main()
