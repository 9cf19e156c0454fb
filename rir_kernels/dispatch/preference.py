"""What "auto" means: the names of implementations, and which of them `use_impl` substitutes for it.

Activation checkpointing reruns a forward within backward: after `use_impl` has ended, and on a GPU in an autograd
thread. There "auto" means what it meant when the graph node was recorded. autograd numbers the nodes that a thread
records, so a thread's `_Scope` stores from which number on which name held. A node of backward has its own scope for
what is recorded within it.

Nothing is stored in torch's own thread state, although autograd would propagate it: gloo's threads copy that state and
need the interpreter's lock to free a Python object in it, while the thread that ends the process group holds the lock.
"""

import bisect
import contextlib
import functools
import operator
import threading
import weakref
from collections import deque

import torch

from ..common.arguments import IMPLS
from ..common.tracing import not_traced

_KEPT = 1024  # changes that a thread remembers; an older graph recomputes as outside use_impl
_NEEDED = ("_current_graph_task_id", "_current_autograd_node")
# private to torch: without them "auto" means in backward what it means in the thread that runs it
_follows_graphs = all(hasattr(torch._C, name) for name in _NEEDED) and hasattr(torch.autograd, "_get_sequence_nr")
_backward = torch._C._current_graph_task_id if _follows_graphs else lambda: -1  # its number, -1 outside backward


class _Scope:
    """What "auto" means where a graph is recorded: in a thread outside backward, or in one node of a backward."""

    def __init__(self, auto: str = "auto"):
        self.auto = auto
        self._before = auto  # what held before the first change
        self._changes: deque[tuple[int, str]] = deque(
            maxlen=_KEPT
        )  # (number of the first node it applies to, name), ascending

    def change(self, name: str) -> None:
        self.auto = name
        if not _follows_graphs:
            return
        number = torch.autograd._get_sequence_nr()  # number of the next node
        if self._changes and self._changes[-1][0] == number:
            self._changes.pop()
        if name != (self._changes[-1][1] if self._changes else self._before):
            self._changes.append((number, name))

    def at(self, number: int) -> str:
        """What "auto" meant when the node of that number was recorded."""
        index = bisect.bisect_right(self._changes, number, key=operator.itemgetter(0))
        return self._changes[index - 1][1] if index else self._before


class _Thread(threading.local):
    def __init__(self):
        self.traced = ""  # what "auto" means within a use_impl that is being compiled
        self.base = _Scope()  # outside backward
        self._nodes = {}  # (backward, node number) -> its scope, while that backward runs
        self._around = {}  # backward -> scope of the node that called it, or None
        # a thread that Python did not start, such as one of autograd's, has recorded no graph itself
        self._is_pythons = not isinstance(threading.current_thread(), threading._DummyThread)
        if self._is_pythons:
            with _lock:
                _recording.add(self.base)

    def scope(self) -> _Scope:
        """The scope that this call is in."""
        backward = _backward()
        if backward < 0:
            self._nodes.clear()  # left over from a backward that failed
            self._around.clear()
            return self.base
        if (node := torch._C._current_autograd_node()) is None:
            return self.base
        number = node._sequence_nr()
        if (backward, number) not in self._nodes:
            if backward not in self._around:
                self._around[backward] = next(reversed(self._nodes.values()), None)
                forget = functools.partial(_forget, self._nodes, self._around, backward)  # in whichever thread it ends
                torch.autograd.Variable._execution_engine.queue_callback(forget)
            self._nodes[backward, number] = _Scope(self._recorded(self._around[backward], number))
        return self._nodes[backward, number]

    def _recorded(self, around, number):
        """What "auto" meant when the node of that number was recorded, in the scope `around` this backward."""
        if around is not None:
            return around.at(number)
        if self._is_pythons:
            return self.base.at(number)
        with _lock:
            names = {scope.at(number) for scope in _recording}
        return names.pop() if len(names) == 1 else "auto"


def _forget(nodes, around, backward):
    around.pop(backward, None)
    for key in [key for key in nodes if key[0] == backward]:
        del nodes[key]


_lock = threading.Lock()
_recording: weakref.WeakSet[_Scope] = weakref.WeakSet()  # the base scopes of Python's threads
_thread = _Thread()
_used = False  # whether any thread has entered use_impl; until then eager calls skip the look-up


@contextlib.contextmanager
def use_impl(name: str):
    """Makes "auto" mean `name` in this thread; calls that name another implementation are not affected.

    A graph recorded within it keeps that meaning: when activation checkpointing reruns a forward, "auto" means what it
    meant the first time. A use_impl that is entered within that forward applies to what is inside it. On a GPU backward
    runs in an autograd thread, which cannot know which thread recorded the graph: if several threads use our layers and
    "auto" does not mean the same in all of them, it means "auto" there. A backward that is called from another thread
    than the one that recorded the graph does not know the recorded meaning either.

    torch.compile reads it only while compiling: a compiled function keeps its implementation.

    Raises ValueError if `name` is none of "auto", "reference", "torch", "hybrid", "triton".
    """
    check_impl(name)
    if torch.compiler.is_compiling():  # nothing is recorded yet, and traced changes do not take effect
        _thread.traced, saved = name, _thread.traced
        try:
            yield
        finally:
            _thread.traced = saved
        return
    global _used
    _used, scope = True, _thread.scope()
    saved = scope.auto
    scope.change(name)
    try:
        yield
    finally:
        scope.change(saved)


def check_impl(impl) -> None:
    """Raises ValueError unless `impl` names an implementation."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def effective_impl(impl: str) -> str:
    """Returns `impl`, or what "auto" means here."""
    return (_thread.traced or _meant()) if impl == "auto" else impl


@not_traced
def _meant() -> str:
    return _thread.scope().auto if _used else "auto"
