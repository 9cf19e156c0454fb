"""Which versions this package is tested with; `bench/matrix/` tests them, and docs/versions.md says what came."""

from collections.abc import Mapping

from ..dispatch.choose import _numbers

# oldest and newest; a release within these minor versions is taken to be like those that were tested
TESTED = {
    "python": ("3.10", "3.13"),
    "torch": ("2.10", "2.14"),
    "triton": ("3.6", "3.9"),
    "numpy": ("1.22", "2.4"),
}


def untested(found: Mapping[str, str]) -> list[str]:
    """What of `found`, versions by the names in TESTED, lies outside it: "torch 2.15.0 (2.10 to 2.14)".

    What does not begin with a number is no version, but a report that there is none: left out.
    """
    return [
        f"{name} {found[name]} ({oldest} to {newest})"
        for name, (oldest, newest) in TESTED.items()
        if found[name][:1].isdigit() and not _numbers(oldest) <= _numbers(found[name]) <= _numbers(newest)
    ]
