"""Warnings that are issued once per process."""

import warnings

from .tracing import not_traced

_warned: set[str] = set()


@not_traced
def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
