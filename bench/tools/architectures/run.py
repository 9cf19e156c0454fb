"""From the list to the files."""

import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.tools.architectures.check import Record, check
from bench.tools.architectures.document import write
from bench.tools.architectures.zoo import ZOO, Architecture
from tooling import console


def chosen(names: Iterable[str]) -> tuple[Architecture, ...]:
    """Those whose "library/name" contains one of the names; all where there is none. ValueError for one unknown."""
    names = tuple(names)
    for name in names:
        if not any(name in one.id for one in ZOO):
            raise ValueError(f"--only: no network is called {name!r}; there are {', '.join(one.id for one in ZOO)}")
    return tuple(one for one in ZOO if not names or any(name in one.id for name in names))


def run(architectures: Iterable[Architecture], folder: Path) -> list[Record]:
    """Checks each and writes what is known after every one of them; networks that do not import are named."""
    records = []
    for architecture in architectures:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own
            record = check(architecture)
        if record is None:
            console.say(f"{architecture.id}: {architecture.library} does not import here")
            continue
        counts = ", ".join(f"{count} x {pattern}" for pattern, count in record.replaced.items()) or "nothing to fuse"
        console.say(f"{record.id}: {counts}{''.join(f'; {defect}' for defect in record.defects)}")
        records.append(record)
        paths = write(records, _versions(), folder)
    for path in paths if records else ():
        console.say(f"wrote {path}")
    return records


def _versions():
    found = {}
    for name in ("rir-kernels", "torch", "torchvision", "timm", "pytorchcv"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
