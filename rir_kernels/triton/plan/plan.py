"""A sequence of launches, recorded once for given shapes and strides and replayed for tensors with the same ones.

A layer's launches differ between calls only in addresses, but preparing them takes far more host time than the launches
themselves: choosing tiles, making views and descriptors, binding and specializing arguments. A plan stores the result:
which memory to allocate, and which compiled kernels to launch with which arguments.

It is recorded on meta tensors: nothing is allocated, nothing runs, and each kernel argument is identified by its
storage. A function that calls operators other than allocations, views, copies and zero fills cannot be recorded.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from rir_kernels.common.switches import interpreting
from rir_kernels.triton.launch.runtime import device_guard, foreseeing, intercepted, observers, report
from rir_kernels.triton.plan.compiled import CompiledLaunch, compile_for
from rir_kernels.triton.plan.places import Place, Unplannable, binder

_ALLOCATIONS = frozenset({"aten::empty.memory_format", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})
_IN_PLACE = frozenset({"aten::copy_", "aten::zero_"})
_KEPT = 64  # sets of addresses: an allocator returns the same few repeatedly
_HERE = contextlib.nullcontext()


class Plan:
    """Recorded launches: `plan(tensors, scalars)` replays the function for tensors of the same shapes and strides."""

    def __init__(self, device, steps, launches, outputs, fresh, workspace):
        self._device = device
        self._steps = steps
        self._launches = launches  # (kernel, programs, options) of the steps that are launches
        self._outputs = outputs  # for each output of the function the index of its buffer, or None
        self._fresh = fresh  # (size, stride, dtype) of each buffer that is returned
        self._workspace = workspace  # in fp32 numbers: all other memory
        self._runs_steps = interpreting() or device.type == "meta"
        self._ready = {}  # compiled launches by address: they depend on nothing else

    def __call__(self, tensors: Sequence[torch.Tensor | None], scalars: tuple[float, ...] = ()) -> tuple:
        """Returns the function's outputs. The tensors' addresses must be multiples of 16 bytes."""
        device = self._device
        buffers = [*tensors]
        for size, stride, dtype in self._fresh:
            buffers.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        if self._workspace:
            buffers.append(torch.empty(self._workspace, dtype=torch.float32, device=device))
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else _HERE:
            for step in self._steps if self._runs_steps else self._at(buffers, scalars):
                if type(step) is functools.partial:
                    step()
                else:
                    step(buffers, scalars)
        if observers and device.type != "meta":
            for launch in self._launches:
                report(*launch)
        return tuple([None if index is None else buffers[index] for index in self._outputs])

    def _at(self, buffers, scalars):
        """Returns the steps as functions without arguments, launches bound to these addresses."""
        addresses = [0 if t is None else t.data_ptr() for t in buffers]
        # Triton launches on the current stream of the current device
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        key = (stream, *scalars, *addresses)
        steps = self._ready.get(key)
        if steps is None:
            if len(self._ready) >= _KEPT:
                self._ready.clear()
            steps = self._ready[key] = [
                step.at(addresses, scalars, stream) if isinstance(step, CompiledLaunch) else step
                for step in self._steps
            ]
        return steps


def record(function: Callable, tensors: Sequence[torch.Tensor | None]) -> Plan:
    """Records a plan of function(*tensors), which returns a tuple of tensors that it allocated, or None.

    The first tensor must not be None. Raises Unplannable if the function does more than allocate, copy and launch.
    """
    first = cast(torch.Tensor, tensors[0])
    device = first.device
    recorder = _Recorder(tensors)
    with torch.no_grad(), device_guard(first):
        with intercepted(recorder.launch, device), recorder:
            outputs = function(*recorder.inputs)
        return recorder.plan(outputs, device)


class _Recorder(TorchDispatchMode):
    def __init__(self, tensors):
        super().__init__()
        self.inputs = [
            None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for t in tensors
        ]
        self._allocated = []
        self._steps = []
        self._launches = []
        self._launch_step: Callable = _InterpretedLaunch if interpreting() else CompiledLaunch
        if (note := foreseeing()) is not None:
            self._launch_step = functools.partial(_ForeseenLaunch, note)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator.name() in _ALLOCATIONS:
            self._allocated.append(result)
        elif operator.name() in _IN_PLACE:
            self._steps.append((_OperatorStep, operator, args))
        elif not operator.is_view:
            raise Unplannable(f"{operator.name()} is neither an allocation nor a view")
        return result

    def launch(self, kernel, programs, *args, **options):
        if self._launch_step is CompiledLaunch:
            compile_for(kernel, args, options)  # here, while a launcher can still fall back to a smaller tile
        self._steps.append((self._launch_step, kernel, programs, args, options))
        self._launches.append((kernel, programs, options))

    def plan(self, outputs, device) -> Plan:
        """Builds the plan in terms of buffers: the inputs, then the outputs, then the workspace."""
        storages = [None if t is None else t.untyped_storage()._cdata for t in (*self.inputs, *self._allocated)]
        handed_out = []
        for output in outputs:
            if output is not None:
                index = storages.index(output.untyped_storage()._cdata) - len(self.inputs)
                if index < 0 or output.storage_offset() or output.stride() != self._allocated[index].stride():
                    raise Unplannable("an output that is not an allocation of its own")
                handed_out.append(index)

        # each allocation's buffer, and its offset there in bytes
        places, size = {}, 0
        for index, tensor in enumerate(self._allocated):
            if index in handed_out:
                places[index] = len(self.inputs) + handed_out.index(index), 0
            else:
                places[index] = len(self.inputs) + len(handed_out), size
                size += -(-tensor.untyped_storage().nbytes() // 256) * 256

        def place(tensor) -> Place:
            index = storages.index(tensor.untyped_storage()._cdata)
            buffer, start = places[index - len(self.inputs)] if index >= len(self.inputs) else (index, 0)
            offset = tensor.storage_offset() + start // tensor.element_size()
            return Place(buffer, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

        steps = [make(place, *what) for make, *what in self._steps]
        fresh = [(tuple(t.shape), t.stride(), t.dtype) for t in (self._allocated[index] for index in handed_out)]
        numbers = iter(range(len(self.inputs), len(self.inputs) + len(fresh)))
        results = [None if t is None else next(numbers) for t in outputs]
        return Plan(device, steps, self._launches, results, fresh, size // 4)


class _OperatorStep:
    """A torch operator that writes to its first argument."""

    def __init__(self, place, operator, args):
        self._operator = operator
        self._places = [place(arg) for arg in args if isinstance(arg, torch.Tensor)]
        self._others = args[len(self._places) :]

    def __call__(self, buffers, scalars):
        with torch.no_grad():
            self._operator(*[where.view(buffers) for where in self._places], *self._others)


class _ForeseenLaunch:
    """A launch that is noted when it is planned, and never runs."""

    def __init__(self, note, _place, kernel, _programs, args, options):
        note(kernel, args, options)

    def __call__(self, buffers, scalars):
        pass


class _InterpretedLaunch:
    """A launch in Triton's interpreter, which takes tensors."""

    def __init__(self, place, kernel, programs, args, options):
        self._start = functools.partial(kernel[(programs,)], **options)
        self._arguments = [(binder(arg, functools.partial(_view, place)), arg) for arg in args]

    def __call__(self, buffers, scalars):
        self._start(*[bind(buffers, scalars) if bind else arg for bind, arg in self._arguments])


def _view(place, arg):
    """Returns a function that makes a tensor, or its descriptor, from the buffers."""
    if isinstance(arg, torch.Tensor):
        where = place(arg)
        return lambda buffers, _scalars: where.view(buffers)
    where = place(arg.base)
    return lambda buffers, _scalars: TensorDescriptor(
        where.view(buffers), arg.shape, arg.strides, arg.block_shape, arg.padding
    )
