"""Modules tell a tracer what is asked of them: for as long as a session lasts, their classes look names up in Python.

Only classes of modules that are traced are changed, each once in a session, and not nn.Module: a change of that costs
the more the more subclasses of it there are in the process. Threads that trace nothing find what they always did.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from .reads import refuse

_here = threading.local()  # tracer: the one that runs in this thread; known: see `session`
_lock = threading.RLock()
_sessions = 0
_changed: set[type] = set()


@contextlib.contextmanager
def session() -> Iterator[defaultdict[object, list]]:
    """What is traced within has the classes changed once, and may keep here what it knows; sessions nest.

    Untraceable within a forward that is traced: whatever is done there to a model would stay.
    """
    global _sessions
    if getattr(_here, "tracer", None) is not None:
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
    _here.tracer = tracer
    try:
        yield
    finally:
        _here.tracer = None


def _look_up(module, name):
    tracer = getattr(_here, "tracer", None)
    return object.__getattribute__(module, name) if tracer is None else tracer.look_up(module, name)


def _restore():
    for kind in _changed:
        if vars(kind).get("__getattribute__") is _look_up:  # and not somebody else's by now
            type.__delattr__(kind, "__getattribute__")
    _changed.clear()
