"""Modules tell a tracer what is asked of them: for as long as a session lasts, their classes look names up in Python.

Only classes of modules that are traced are changed, each once in a session, and not nn.Module: a change of that costs
the more the more subclasses of it there are in the process. Threads that trace nothing find what they always did.
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
    """Why a forward has no graph that stands for it. No Exception, which forward may catch."""


def refuse(reason: str):
    """Raises it; the tracer of this thread remembers, since a bare `except` in forward catches even this."""
    tracer = _tracers.get(threading.get_ident())
    if tracer is not None:
        tracer.refusals.append(reason)
    raise Untraceable(reason)


@contextlib.contextmanager
def session() -> Iterator[defaultdict[object, list]]:
    """What is traced within has the classes changed once, and may keep here what it knows; sessions nest.

    Untraceable within a forward that is traced: whatever is done there to a model would stay.
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
    """Within it tracer.look_up is asked for every attribute of these modules, by this thread. Only in a session."""
    for kind in {type(module) for module in modules} - _changed:
        if kind.__getattribute__ not in (object.__getattribute__, _look_up):
            refuse(f"{kind.__name__} has a __getattribute__, by which attributes may be anything")
        with _lock:
            _changed.add(kind)
            type.__setattr__(kind, "__getattribute__", _look_up)  # a metaclass is not asked
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
        if vars(kind).get("__getattribute__") is _look_up:  # and not somebody else's by now
            type.__delattr__(kind, "__getattribute__")
    _changed.clear()
