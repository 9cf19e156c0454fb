"""Detects what watches or transforms operators, and marks what torch.compile does not trace."""

import contextlib
import threading

import torch
from torch.autograd import forward_ad


class _PerThread(threading.local):
    replays = True  # whether recorded plans are replayed


_thread = _PerThread()


def not_traced(function):
    """Marks a function that torch.compile calls without tracing, taking its result as a constant.

    torch.compiler.assume_constant_result sets the same mark, but imports the compiler for it, and thereby triton.
    The compiler sees the mark only on plain functions: it looks through functools.cache.
    """
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def no_replay():
    """Disables plan replay in this thread: every call chooses and issues its launches afresh."""
    _thread.replays, saved = False, _thread.replays
    try:
        yield
    finally:
        _thread.replays = saved


def is_plain_eager() -> bool:
    """Whether no compiler, tracer, dispatch mode or function transform is active here, and plan replay is enabled."""
    return (
        not torch.compiler.is_compiling()
        and _thread.replays
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is active here; the kernels have no rules for either."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
