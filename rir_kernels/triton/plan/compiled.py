"""Launches a compiled kernel with its recorded arguments at other addresses.

A launch through Triton's Python encodes each TMA descriptor again and walks all arguments twice. Here this happens
once per set of addresses, and a launch is only one call of the underlying C function.
"""

import copy
import functools
import threading
import types

from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from rir_kernels.triton.launch.runtime import ALIGNMENT
from rir_kernels.triton.plan.places import Slot, Unplannable, binder


class CompiledLaunch:
    """A recorded launch; `at(addresses, scalars, stream)` returns a function without arguments that makes it."""

    def __init__(self, place, kernel, programs, args, options):
        compiled = compile_for(kernel, args, options)
        self._start = compiled[(programs, 1, 1)]
        try:
            self._collect, self._c_launch = _split_launcher(compiled, programs)
        except (AttributeError, KeyError):  # the launcher of another Triton version: call it as it is
            self._collect = self._c_launch = None
        # all of the kernel's parameters in order, including constexpr ones
        parameters = dict(zip(kernel.arg_names, args, strict=False)) | options
        self._arguments = [parameters[name] for name in kernel.arg_names]
        bound = [binder(arg, functools.partial(_address, place)) for arg in self._arguments]
        self._bound = [(position, bind) for position, bind in enumerate(bound) if bind]

    def at(self, addresses: list[int], scalars: tuple[float, ...], stream: int) -> functools.partial:
        """Binds the launch; `addresses` are those of the plan's buffers."""
        args = self._arguments.copy()
        for position, bind in self._bound:
            args[position] = bind(addresses, scalars)
        if self._c_launch is None:
            return functools.partial(self._start, *args, stream=stream)
        return functools.partial(self._c_launch, *self._collect(*args, stream=stream))


def _address(place, arg):
    """Returns a function that makes the address, or the descriptor, of a tensor from the buffers' addresses."""
    descriptor = arg if isinstance(arg, TensorDescriptor) else None
    where = place(arg if descriptor is None else descriptor.base)
    if where.start % ALIGNMENT:  # the kernel is compiled for addresses that are multiples of 16
        raise Unplannable("a view that is not aligned")
    if descriptor is None:
        return lambda addresses, _scalars: addresses[where.buffer] + where.start
    return lambda addresses, _scalars: _moved(descriptor, addresses[where.buffer] + where.start)


def compile_for(kernel, args, options):
    """Returns the compiled and loaded kernel. Raises OutOfResources if it exceeds the GPU's resources."""
    plain = [float(arg) if isinstance(arg, Slot) else arg for arg in args]
    compiled = kernel.warmup(*plain, grid=(1,), **options)
    compiled._init_handles()
    return compiled


class _Address:
    """Has the attributes of a descriptor's tensor that the launcher reads."""

    def __init__(self, address):
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _moved(descriptor, address):
    descriptor = copy.copy(descriptor)  # skips the constructor's checks, which have passed
    descriptor.base = _Address(address)
    return descriptor


class _Observed(CompiledKernel):
    """A compiled kernel that launches through another launcher."""

    def __init__(self, compiled, launcher):
        self.__dict__.update(compiled.__dict__, _run=launcher)

    def __del__(self):
        pass  # since Triton 3.8 the base's unloads the code from the GPU, and the other kernel still launches it


def _split_launcher(compiled, programs):
    """Returns (a function that maps a kernel's arguments to those of the C launch function, that C function).

    Raises AttributeError or KeyError if Triton's launcher is not built as in 3.6 to 3.9: an object whose `launch` is
    the C function, or a closure that encodes the descriptors and passes everything on to a `launcher`.
    """
    launcher = copy.copy(compiled.run)
    collected = threading.local()

    def collect(*args):
        collected.args = args

    beneath = launcher.launch
    if isinstance(beneath, types.BuiltinFunctionType):
        launcher.launch = collect
    else:
        cells = dict(zip(beneath.__code__.co_freevars, beneath.__closure__, strict=True))
        cells["launcher"], c_function = types.CellType(collect), cells["launcher"].cell_contents
        launcher.launch = types.FunctionType(
            beneath.__code__, beneath.__globals__, closure=tuple(cells[name] for name in beneath.__code__.co_freevars)
        )
        beneath = c_function
    start = _Observed(compiled, launcher)[(programs, 1, 1)]

    def arguments(*args, stream):
        start(*args, stream=stream)
        return collected.args

    return arguments, beneath
