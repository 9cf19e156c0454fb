"""What "auto" means: the names of implementations, and which of them `use_impl` puts in its place.

Activation checkpointing runs a forward again within backward: after `use_impl` has ended, and on a GPU in a thread of
autograd's. There "auto" means what it did where the node of the graph was recorded. autograd numbers the nodes that a
thread records, so a thread keeps from which number on which name held (`_Scope`), and its scope travels with torch's
own state of the thread, which autograd hands to its threads and gives back after each node.
"""

import bisect
import contextlib
import ctypes
import operator
import sys
import threading
from collections import deque

import torch

from .compiling import not_traced

IMPLS = ("auto", "reference", "torch", "hybrid", "triton")
_KEPT = 1024  # changes that a thread remembers; an older graph recomputes as outside of use_impl
_KEY = "rir_kernels.preference"
_NEEDED = ("_current_graph_task_id", "_current_autograd_node", "_stash_obj_in_tls", "_get_obj_in_tls", "_is_key_in_tls")
# private to torch: where they are missing, "auto" means in backward what it does in the thread that runs it
_follows_graphs = all(hasattr(torch._C, name) for name in _NEEDED) and hasattr(torch.autograd, "_get_sequence_nr")
_backward = torch._C._current_graph_task_id if _follows_graphs else lambda: -1  # its number, -1 outside of one
_take_back = getattr(torch._C, "_remove_obj_from_tls", None)  # torch 2.11 has none


class _Scope:
    """What "auto" means where a graph is recorded: in a thread outside of backward, or in one node of a backward."""

    def __init__(self, auto: str = "auto", task: int = -1):
        self.auto = auto
        self.task = task  # the backward, by autograd's number for it
        self._before = auto  # the first change
        self._changes = deque(maxlen=_KEPT)  # (number of the first node that it concerns, name), ascending

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


class _Ending:
    """Takes the scope out of torch's state of a thread when Python's state of it goes.

    Later the thread would have to wait for the interpreter's lock to free it: for ever, where the interpreter ends too.
    """

    def __del__(self, take_back=_take_back, key=_KEY):
        take_back(key)


class _Thread(threading.local):
    def __init__(self):
        self.traced = ""  # what "auto" means within a use_impl that is being compiled
        self.scope = _Scope()
        self.ending = None

    def share(self):
        """Lets autograd's threads know the scope."""
        if not _follows_graphs or torch._C._is_key_in_tls(_KEY):
            return
        if _take_back is not None:
            self.ending = self.ending or _Ending()
        elif threading.current_thread() is not threading.main_thread():  # which does not end before the interpreter
            return
        _stash(self.scope)


def _stash(scope):
    """Puts the scope into torch's state of this thread."""
    count = sys.getrefcount(scope)
    torch._C._stash_obj_in_tls(_KEY, scope)
    if sys.getrefcount(scope) == count:  # torch 2.11 takes no reference, and gives one back all the same
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(scope))


_thread = _Thread()
_used = False  # whether any thread has entered use_impl: until then the look-up costs every eager call less


@contextlib.contextmanager
def use_impl(name: str):
    """Within it "auto" means `name`, in this thread; calls that name another implementation are left alone.

    What is recorded for autograd within it keeps that: where activation checkpointing runs a forward again, "auto"
    means what it meant the first time, in whichever thread autograd runs it. There, too, a use_impl that is entered
    within the forward counts for what is inside of it. It is meant for a backward that is called in the thread that
    recorded the graph.

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
    _used, scope = True, _scope()
    saved = scope.auto
    if scope is _thread.scope:
        _thread.share()
    scope.change(name)
    try:
        yield
    finally:
        scope.change(saved)


def check_impl(impl) -> None:
    """ValueError unless `impl` names an implementation."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def meant_by(impl: str) -> str:
    """`impl`, or what "auto" means here."""
    return (_thread.traced or _meant()) if impl == "auto" else impl


@not_traced
def _meant() -> str:
    return _scope().auto if _used else "auto"


def _scope() -> _Scope:
    """The scope that this call is in."""
    task = _backward()
    if task < 0:
        return _thread.scope
    outer = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else _thread.scope
    node = torch._C._current_autograd_node()
    if outer.task == task or node is None:
        return outer
    # autograd takes it from this thread's state when the node is done, and hands it to a backward within the node
    inner = _Scope(outer.at(node._sequence_nr()), task)
    _stash(inner)
    return inner
