"""Are the committed results those of the current kernels?"""

from pathlib import Path
from typing import NamedTuple

from .results import ResultsError, load

FOLDER = Path(__file__).resolve().parent / "results"


class Status(NamedTuple):
    path: Path
    text: str
    stale: bool


def check(folder: str | Path = FOLDER) -> list[Status]:
    """The status of every <device>/*.json in `folder`; empty where nothing is committed.

    A file is stale if the kernels' sources have changed since, or if it cannot be read.
    """
    return [_status(path) for path in sorted(Path(folder).glob("*/*.json"))]


def _status(path):
    from .provenance import sources_hash

    try:
        results = load(path)
    except ResultsError as error:
        return Status(path, str(error), True)
    stale = results.sources_hash != sources_hash()
    text = "stale: the kernels have changed since; measure again" if stale else "of the current kernels"
    if results.git_dirty:
        text += "; taken with changes that were not committed"
    return Status(path, text, stale)
