"""What "auto" means: the names of implementations, and which of them `use_impl` puts in its place.

Activation checkpointing runs a forward again within backward: after `use_impl` has ended, and on a GPU in a thread of
autograd's. There "auto" means what it did when the node of the graph was recorded. autograd numbers the nodes that a
thread records, so a thread's `_Scope` keeps from which number on which name held. What is recorded within a node of
backward has a scope of that node.

Nothing is left in torch's own thread state, though autograd would hand it on: gloo's threads copy that state and need
the interpreter's lock to free a Python object in it, while the thread that ends the process group holds the lock.
"""

import bisect
import contextlib
import functools
import operator
import threading
import weakref
from collections import deque

import torch

from ..common.tracing import not_traced

IMPLS = ("auto", "reference", "torch", "hybrid", "triton")
_KEPT = 1024  # changes that a thread remembers; an older graph recomputes as outside of use_impl
_NEEDED = ("_current_graph_task_id", "_current_autograd_node")
# private to torch: where they are missing, "auto" means in backward what it does in the thread that runs it
_follows_graphs = all(hasattr(torch._C, name) for name in _NEEDED) and hasattr(torch.autograd, "_get_sequence_nr")
_backward = torch._C._current_graph_task_id if _follows_graphs else lambda: -1  # its number, -1 outside of one


class _Scope:
    """What "auto" means where a graph is recorded: in a thread outside of backward, or in one node of a backward."""

    def __init__(self, auto: str = "auto"):
        self.auto = auto
        self._before = auto  # the first change
        self._changes: deque[tuple[int, str]] = deque(
            maxlen=_KEPT
        )  # (number of the first node that it concerns, name), ascending

    def change(self, name: str) -> None:
        self.auto = name
        if not _follows_graphs:
            return
        number = torch.autograd._get_sequence_nr()  # of the next node
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
        self.base = _Scope()  # outside of backward
        self._nodes = {}  # (backward, number of the node): its scope, as long as that backward runs
        self._around = {}  # backward: the scope of the node that it was called in, None where there is none
        # a thread that Python did not start, such as autograd's, has recorded nothing by itself
        self._is_pythons = not isinstance(threading.current_thread(), threading._DummyThread)
        if self._is_pythons:
            with _lock:
                _recording.add(self.base)

    def scope(self) -> _Scope:
        """The one that this call is in."""
        backward = _backward()
        if backward < 0:
            self._nodes.clear()  # of a backward that failed
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
_used = False  # whether any thread has entered use_impl: until then the look-up costs every eager call less


@contextlib.contextmanager
def use_impl(name: str):
    """Within it "auto" means `name`, in this thread; calls that name another implementation are left alone.

    What is recorded for autograd within it keeps that: where activation checkpointing runs a forward again, "auto"
    means what it meant the first time. A use_impl that is entered within that forward counts for what is inside of it.
    On a GPU backward runs in a thread of autograd's, which cannot know who recorded the graph: if several threads use
    our layers, and "auto" does not mean the same to all of them, it means "auto" there. A backward that is called from
    another thread than the one that recorded the graph does not know what held there either.

    torch.compile looks while it compiles and not again: a compiled function keeps the implementation it was given.

    ValueError where `name` is none of "auto", "reference", "torch", "hybrid", "triton".
    """
    check_impl(name)
    if torch.compiler.is_compiling():  # nothing is recorded yet, and what the compiler traces does not happen
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
    """ValueError unless `impl` names an implementation."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def effective_impl(impl: str) -> str:
    """`impl`, or what "auto" means here."""
    return (_thread.traced or _meant()) if impl == "auto" else impl


@not_traced
def _meant() -> str:
    return _thread.scope().auto if _used else "auto"
