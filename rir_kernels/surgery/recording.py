"""Modules report attribute look-ups to a tracer: during a session, their classes look names up in Python.

This changes only classes of traced modules, each once per session, and not nn.Module: the cost of changing that grows
with the number of its subclasses in the process. Threads that trace nothing see no difference.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

_tracers: dict = {}  # by thread
_here = threading.local()  # known: see `session`
_lock = threading.RLock()
_sessions = 0
_changed: set[type] = set()


class Untraceable(BaseException):
    """Raised when forward cannot be captured as one graph. Not an Exception, which forward may catch."""


def refuse(reason: str):
    """Raises Untraceable; this thread's tracer remembers it, since a bare `except` in forward catches even this."""
    tracer = _tracers.get(threading.get_ident())
    if tracer is not None:
        tracer.refusals.append(reason)
    raise Untraceable(reason)


@contextlib.contextmanager
def session() -> Iterator[defaultdict[object, list]]:
    """Keeps classes changed for all traces within, and yields a cache for these; sessions nest.

    Raises Untraceable within a traced forward: what a session does to a model there would persist.
    """
    global _sessions
    if threading.get_ident() in _tracers:
        refuse("its forward fuses or folds a model")
    outer = getattr(_here, "known", None)
    with _lock:
        _sessions += 1
    _here.known = defaultdict(list) if outer is None else outer
    try:
        yield _here.known
    finally:
        _here.known = outer
        with _lock:
            _sessions -= 1
            if not _sessions:
                _restore()


@contextlib.contextmanager
def recording(tracer, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Calls tracer.look_up for every attribute that this thread reads from these modules. Requires a session."""
    for kind in {type(module) for module in modules} - _changed:
        if kind.__getattribute__ not in (object.__getattribute__, _look_up):
            refuse(f"{kind.__name__} has a __getattribute__, by which attributes may be anything")
        with _lock:
            _changed.add(kind)
            type.__setattr__(kind, "__getattribute__", _look_up)  # bypasses the metaclass
    _tracers[threading.get_ident()] = tracer
    try:
        yield
    finally:
        del _tracers[threading.get_ident()]


def _look_up(module, name, plain=object.__getattribute__):
    tracer = _tracers.get(threading.get_ident()) if _tracers else None
    return plain(module, name) if tracer is None else tracer.look_up(module, name)


def _restore():
    for kind in _changed:
        if vars(kind).get("__getattribute__") is _look_up:  # and nobody has replaced it since
            type.__delattr__(kind, "__getattribute__")
    _changed.clear()
