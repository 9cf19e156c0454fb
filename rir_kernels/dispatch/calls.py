"""record_calls: which operations ran, and with which implementation.

Without a recorder, an operation only checks `on`. With one, the module that is being called is found on the stack, so
that no call has to pass it down.
"""

import contextlib
import sys
import threading
from dataclasses import dataclass

import torch
from torch import nn

from ..common.call import Call as Operation
from ..common.fused_class import class_of
from ..common.tables import Table
from ..common.tracing import not_traced
from .choose import why_not_triton


@dataclass(frozen=True)
class Call:
    """One operation that ran, or a fused unit that did not run fused.

    name: the name of the module that was being called, if record_calls was given the model; else its class. Outside
    any module, the function: "conv_bn_act" or "norm_act".
    shape: of x; if a unit's own forward ran instead, the shape of its first tensor argument.
    impl: what ran: "triton", "hybrid", "torch" or "reference"; "" if the modules were called one by one.
    reason: why it did not run fused, or why "auto" did not take "triton".
    """

    name: str
    shape: tuple[int, ...]
    impl: str
    fused: bool
    reason: str


class Calls(Table):
    """What record_calls has recorded, in order of start."""

    kind = Call

    def headline(self) -> str:
        """The counts, in one line."""
        fused = sum(call.fused for call in self)
        return f"{fused} of {len(self)} calls ran fused"


class _Recorder:
    def __init__(self, model):
        self.calls = Calls()
        # the modules as well: kept alive, so that no other object gets one of their ids
        self.named = {} if model is None else {id(module): (name, module) for name, module in model.named_modules()}


recorders: tuple[_Recorder, ...] = ()  # process-wide; replaced, never mutated
_lock = threading.Lock()


@contextlib.contextmanager
def record_calls(model: nn.Module | None = None):
    """Lists every operation that runs within: of fused units, of our modules, of `rir.functional`.

        with rir.record_calls(model) as calls:
            model(x)
        print(calls)

    Each has `.name .shape .impl .fused .reason`, see Call. A fused unit that runs its own forward is one entry for that
    call, with the reason; if only one of its operations runs unfused, that operation is an entry. An operation is
    listed when it begins, so one that fails midway is the last; one that is refused for its arguments is not listed.
    Backward is not listed; a forward that activation checkpointing reruns is listed again.

    Calls of all threads are listed; contexts may be nested, and each sees everything that runs within it. In a graph
    made by torch.compile, Python does not run and nothing is listed: the graph contains what the same call lists in
    eager mode.

    Args:
        model: its modules get their names as in named_modules(); any other module is listed by its class.

    Raises TypeError for a model that is no nn.Module.
    """
    global recorders
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    recorder = _Recorder(model)
    with _lock:
        recorders = (*recorders, recorder)
    try:
        yield recorder.calls
    finally:
        with _lock:
            recorders = tuple(one for one in recorders if one is not recorder)


@not_traced
def on() -> bool:
    """Whether anyone records. The compiler takes the answer as a constant, so it keeps no guard on it."""
    return len(recorders) > 0


def ran(call: Operation, *, asked: str, meant: str, impl: str) -> None:
    """Records an operation that is about to run as `impl`; `asked` resolved to `meant` for its tensors."""
    if torch.compiler.is_compiling():
        return
    reason, shape = "", tuple(call.x.shape)
    if impl != meant:
        reason = "there is no image in the batch" if shape[0] == 0 else "its statistics are those of several ranks"
    elif asked == "auto" and impl != "triton":
        reason = why_not_triton(call.x, call.weight, call.spec, call.training)
    _write(_running(), "norm_act" if call.weight is None else "conv_bn_act", shape, impl, True, reason)


def ran_one_by_one(module: nn.Module | None, inputs, reason) -> None:
    """Records that a fused unit, or one of its operations, ran as before fusion; module None: the one running now."""
    shape = next((tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)), ())
    _write(_running() if module is None else module, "conv_bn_act", shape, "", False, reason)


def _write(module, function, *what):
    for recorder in recorders:
        name = function if module is None else _name(recorder, module)
        recorder.calls.append(Call(name, *what))


def _name(recorder, module):
    name, _ = recorder.named.get(id(module), (None, None))
    return class_of(module).__name__ if name is None else name


def _running():
    """The innermost module that is being called in this thread."""
    frame, call = sys._getframe(1), nn.Module._call_impl.__code__
    while frame is not None and frame.f_code is not call:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]
