"""What watches or transforms operators, and what torch.compile does not look into."""

import contextlib
import threading

import torch
from torch.autograd import forward_ad


class _PerThread(threading.local):
    replays = True  # whether recorded launches are used


_thread = _PerThread()


def not_traced(function):
    """torch.compile calls the function and takes its result for a constant.

    torch.compiler.assume_constant_result sets the same mark, but imports the compiler for it, and with that triton.
    The compiler sees the mark on plain functions alone: it looks through functools.cache.
    """
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def no_replay():
    """Disables plan replay in this thread: every call chooses and makes its launches anew."""
    _thread.replays, saved = False, _thread.replays
    try:
        yield
    finally:
        _thread.replays = saved


def is_plain_eager() -> bool:
    """Whether nothing watches or transforms operators here: compiler, tracer, dispatch mode, function transform."""
    return (
        not torch.compiler.is_compiling()
        and _thread.replays
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD looks through operators here, which the kernels have no rules for."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
