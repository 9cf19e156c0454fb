"""Calls like one before: same function, same options, tensors that differ from the earlier ones in addresses alone.

What such a call launches is known from the first one, which leaves a plan (`triton.launch.plan`).
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import Parameter

from ..common import switches, tracing

_PLAIN = frozenset({torch.Tensor, Parameter, type(None)})
_ALIGNMENT = 16  # bytes; kernels are compiled for addresses that are multiples of it
_NOT_YET = object()
_KEPT = 4096  # kinds of calls


class Kinds(dict):
    """What is known of calls, by their kind; as many as fit, and apart from all others within `apart`."""

    _all: ClassVar[list["Kinds"]] = []

    def __init__(self):
        super().__init__()
        self._all.append(self)

    def remember(self, kind, value):
        """The value, or what was remembered already."""
        if len(self) >= _KEPT:
            self.clear()
        return self.setdefault(kind, value)

    @classmethod
    @contextlib.contextmanager
    def apart(cls) -> Iterator[None]:
        """Within it nothing is known, and nothing of what is learnt there is known after it."""
        saved = [(kinds, kinds.copy()) for kinds in cls._all]
        try:
            for kinds, _ in saved:
                kinds.clear()
            yield
        finally:
            for kinds, known in saved:
                kinds.clear()
                kinds.update(known)


_repeated = Kinds()


def run(function: Callable, options: Hashable, tensors: Sequence[torch.Tensor | None]) -> tuple:
    """function(options, (), *tensors), by its plan where it can have one; see `Repeated`."""
    kind = metadata(tensors)
    if kind is None:
        return function(options, (), *tensors)
    key = (function, options, kind)
    repeated = _repeated.get(key) or _repeated.remember(key, Repeated(function, options))
    return repeated(tensors)


class Repeated:
    """function(options, scalars, *tensors) for tensors of one kind, which leaves a plan where it can have one.

    function: returns a tuple of tensors that it allocates, and None. scalars: numbers that kernels are handed as they
    are, which may differ from call to call.
    """

    def __init__(self, function: Callable, options: Hashable, repeats: bool = True):
        self._run = functools.partial(function, options)
        self._plan: Any = _NOT_YET if repeats else None

    def __call__(self, tensors: Sequence[torch.Tensor | None], scalars: tuple[float, ...] = ()) -> tuple:
        if self._plan is _NOT_YET:
            places = importlib.import_module("rir_kernels.triton.plan.places")
            slots = tuple(places.Slot(index) for index in range(len(scalars)))
            self._plan = record(functools.partial(self._run, slots), tensors)
        return self._run(scalars, *tensors) if self._plan is None else self._plan(tensors, scalars)


def metadata(tensors: Sequence[torch.Tensor | None]) -> tuple | None:
    """What of the tensors, and of torch's switches, a plan depends on; None where nothing may be planned."""
    if tensors[0] is None or not {type(t) for t in tensors} <= _PLAIN or not tracing.is_plain_eager():
        return None
    try:
        found = [
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % _ALIGNMENT) for t in tensors
        ]
    except RuntimeError:  # a sparse tensor has no strides
        return None
    return (*found, tensors[0].dtype == torch.float32 and switches.tf32_allowed())


def record(function: Callable, tensors: Sequence[torch.Tensor | None]) -> Callable | None:
    """The plan of function(*tensors), None where it can have none."""
    present = [t for t in tensors if t is not None]
    # kernels are compiled for aligned addresses, and read the values of the channels one behind the other
    if any(t.data_ptr() % _ALIGNMENT or (t.dim() == 1 and not t.is_contiguous()) for t in present):
        return None
    places = importlib.import_module("rir_kernels.triton.plan.places")
    plan = importlib.import_module("rir_kernels.triton.plan.plan")
    try:
        return plan.record(function, tensors)
    except places.Unplannable:
        return None
