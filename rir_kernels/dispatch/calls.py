"""record_calls: which operations ran, and in which implementation.

While nobody records, an operation asks `on` and no more. While somebody does, the module that is being called is found
on the stack, so that no call has to hand it down.
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

    name: of the module that was being called, where record_calls has been given the model; else its class. Outside of
    any module the function: "conv_bn_act" or "norm_act".
    shape: of x; of a unit whose whole forward ran instead, that of the first tensor it was given.
    impl: what ran: "triton", "hybrid", "torch" or "reference"; "" where the modules were called one by one.
    reason: why it did not run fused, or why "auto" did not take "triton".
    """

    name: str
    shape: tuple[int, ...]
    impl: str
    fused: bool
    reason: str


class Calls(Table):
    """What record_calls has seen, in the order in which it began."""

    kind = Call

    def headline(self) -> str:
        """Counts, in one line."""
        fused = sum(call.fused for call in self)
        return f"{fused} of {len(self)} calls ran fused"


class _Recorder:
    def __init__(self, model):
        self.calls = Calls()
        # the modules as well, so that no other one comes to have such an id
        self.named = {} if model is None else {id(module): (name, module) for name, module in model.named_modules()}


recorders: tuple[_Recorder, ...] = ()  # of the whole process; never changed, always another one
_lock = threading.Lock()


@contextlib.contextmanager
def record_calls(model: nn.Module | None = None):
    """A list of every operation that runs within: of fused units, of our modules, of `rir.functional`.

        with rir.record_calls(model) as calls:
            model(x)
        print(calls)

    Each has `.name .shape .impl .fused .reason`, see Call. A fused unit that runs its own forward is one entry for that
    call, with the reason; where only one of its operations runs one by one, that one is an entry. An operation is
    listed as it begins, so that one that fails on the way is the last; one that is refused for its arguments is not
    listed. Backward is not; where activation checkpointing runs a forward again, that is listed again.

    Calls of every thread are listed; contexts may be nested, and each sees all that runs within it. Where torch.compile
    has made a graph of a forward, Python does not run, and nothing is listed: what a graph contains is what the same
    call lists in eager mode.

    Args:
        model: whose modules get their names as in named_modules(); what it does not contain is listed by its class.

    TypeError for a model that is no nn.Module.
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
    """Whether anybody records. The compiler takes the answer for a constant, and so keeps no guard on it."""
    return len(recorders) > 0


def ran(call: Operation, *, asked: str, meant: str, impl: str) -> None:
    """Writes down an operation that is about to run as `impl`; `asked` meant `meant` for its tensors."""
    if torch.compiler.is_compiling():
        return
    reason, shape = "", tuple(call.x.shape)
    if impl != meant:
        reason = "there is no image in the batch" if shape[0] == 0 else "its statistics are those of several ranks"
    elif asked == "auto" and impl != "triton":
        reason = why_not_triton(call.x, call.weight, call.spec, call.training)
    _write(_running(), "norm_act" if call.weight is None else "conv_bn_act", shape, impl, True, reason)


def ran_one_by_one(module: nn.Module | None, inputs, reason) -> None:
    """Writes down that a fused unit, or one operation of it, did what forward did before; None: whichever runs now."""
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
