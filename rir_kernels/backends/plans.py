"""Plan replay: calls with an earlier call's function and options, whose tensors differ from its own only in addresses.

The launches of such a call are known from the first one, which records a plan (`triton.plan`).
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
_KEPT = 4096  # entries per cache


class Kinds(dict):
    """A bounded cache of what is known of calls, keyed by their kind; `apart` isolates it."""

    _all: ClassVar[list["Kinds"]] = []

    def __init__(self):
        super().__init__()
        self._all.append(self)

    def remember(self, kind, value):
        """Stores the value; returns it, or the one stored earlier."""
        if len(self) >= _KEPT:
            self.clear()
        return self.setdefault(kind, value)

    @classmethod
    @contextlib.contextmanager
    def apart(cls) -> Iterator[None]:
        """Empties all caches on entry, and restores them on exit."""
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
    """Runs function(options, (), *tensors), by replaying its plan if it can have one; see `Repeated`."""
    kind = metadata(tensors)
    if kind is None:
        return function(options, (), *tensors)
    key = (function, options, kind)
    repeated = _repeated.get(key) or _repeated.remember(key, Repeated(function, options))
    return repeated(tensors)


class Repeated:
    """Runs function(options, scalars, *tensors) for tensors of one kind, and records a plan if it can have one.

    function: returns a tuple of tensors that it allocates, and None. scalars: numbers passed to kernels unchanged,
    which may differ from call to call.
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
    """The properties of the tensors, and torch's switches, that a plan depends on; None if no plan is possible."""
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
    """Records the plan of function(*tensors); None if it can have none."""
    present = [t for t in tensors if t is not None]
    # kernels are compiled for aligned addresses, and expect contiguous per-channel vectors
    if any(t.data_ptr() % _ALIGNMENT or (t.dim() == 1 and not t.is_contiguous()) for t in present):
        return None
    places = importlib.import_module("rir_kernels.triton.plan.places")
    plan = importlib.import_module("rir_kernels.triton.plan.plan")
    try:
        return plan.record(function, tensors)
    except places.Unplannable:
        return None
