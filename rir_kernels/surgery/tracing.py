"""The graph of one module's forward, its children opaque, and everything that graph was decided by.

torch.fx runs forward once with placeholders. What forward decides in Python on the way is baked into the graph, so it
is written down (`Read`), to be asked again at every call. What a graph cannot show stops the trace: a forward that goes
another way in evaluation or without gradients, draws random numbers, makes tensors, sets attributes, asks what type a
value is, or runs a part of itself under another mode (no_grad, autocast, checkpointing).
"""

import contextlib
import enum
import functools
import inspect
import itertools
import random
import sys
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from . import in_place
from .by_name import asks_which
from .outside import Outside, is_fixed
from .swap import class_of
from .watch import Watch

Path = tuple[str, ...]  # of names of children; () is the module itself


class Untraceable(BaseException):
    """Why a forward has no graph that stands for it. No Exception, which forward may catch."""


class Read(NamedTuple):
    """`name` of the module at `path`, as forward found it: see `holds`."""

    path: Path
    name: str
    found: Any


class Trace(NamedTuple):
    """inputs: the names of forward's arguments without a default; the others had their defaults.

    asks_mode: whether a forward that was looked into reads `training`. asks_which: whether code that ran may ask which
    of its children is which, or of what class. outside: what else decided the graph, such as
    answers of torch, which have `arguments`.
    """

    graph: fx.Graph
    reads: tuple[Read, ...]
    outside: tuple[Outside, ...]
    inputs: tuple[str, ...]
    asks_mode: bool
    asks_which: bool = False


class _Found(enum.Enum):
    NONE = "a child, parameter or buffer that is None"
    PRESENT = "a child, parameter or buffer that is not"
    OF_THE_CLASS = "a method or property that the instance does not override"
    ABSENT = "nothing: hasattr was False, or getattr returned its default"


class _Children(NamedTuple):
    names: tuple[str, ...]


class _Items(NamedTuple):
    of_dict: tuple[tuple, ...]


_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)


def trace(module: nn.Module, inlined: frozenset[str] = frozenset()) -> Trace:
    """The graph of type(module).forward. `inlined`: paths ("a.b") of children that are looked into.

    Nodes know in whose forward they stand: node.meta["scope"], a Path. Raises Untraceable; the module is as before.
    Other threads should not run models meanwhile: torch.fx puts itself in the place of nn.Module's methods.
    """
    traces = trace_modes(module, inlined)
    first = traces[0]
    if len({_code(trace.graph) for trace in traces}) > 1:
        raise Untraceable("its forward is another one in evaluation, or without gradients")
    reads = dict.fromkeys(read for trace in traces for read in trace.reads)
    outside = dict.fromkeys(one for trace in traces for one in trace.outside)
    # a question with two answers is one about gradients: neither makes a difference
    asked = Counter(one.question for one in outside)
    outside = (one for one in outside if one.arguments is None or asked[one.question] == 1)
    which = any(trace.asks_which for trace in traces)
    return first._replace(reads=tuple(reads), outside=tuple(outside), asks_which=which)


def trace_modes(module: nn.Module, inlined: frozenset[str] = frozenset(), *, options: bool = False) -> list[Trace]:
    """As `trace`, one for each mode: training or, where forward asks, evaluation; with gradients and without.

    options: with the arguments that have a default given as well, the reverse of a bool.
    """
    traces = []
    for training, gradients in itertools.product((True, False), repeat=2):
        if not training and not any(trace.asks_mode for trace in traces):
            break  # evaluation can make no difference
        if not gradients and not any(one.arguments is not None for trace in traces for one in trace.outside):
            continue  # nor can gradients, where torch is asked for nothing
        with _mode(module, inlined, training), torch.set_grad_enabled(gradients):
            traces.append(_trace(module, inlined, options))
    return traces


def sketch(module: nn.Module, inlined: frozenset[str] = frozenset()) -> fx.Graph:
    """The graph in training alone, at a quarter of the price: for a first look. Raises as `trace` does."""
    with _mode(module, inlined, True), torch.enable_grad():
        return _trace(module, inlined).graph


def holds(module: nn.Module, read: Read) -> bool:
    """Whether the attribute still is what the trace found: cheap, since it is asked at every call."""
    found, name = read.found, read.name
    if found is _Found.OF_THE_CLASS:
        return name not in module.__dict__
    if found is _Found.ABSENT:
        return not _has(module, name)
    if found is _Found.PRESENT or found is _Found.NONE:
        # nn.Module's own look-up is in Python, and slow
        value = module._modules.get(name)
        value = getattr(module, name, None) if value is None else value
        return (value is None) == (found is _Found.NONE)
    if type(found) is _Children:
        return tuple(module._modules) == found.names
    value = getattr(module, name, _Found.PRESENT)  # which equals no constant
    if type(found) is _Items:
        return isinstance(value, dict) and tuple(value.items()) == found.of_dict
    return (tuple(value) if type(value) is list else value) == found


def is_of_the_class(read: Read) -> bool:
    """Whether it is a method or property that the instance does not override."""
    return read.found is _Found.OF_THE_CLASS


def _has(module, name):
    """hasattr, without the exception that nn.Module raises and catches for a name it does not know."""
    kept = (module.__dict__, module._modules, module._parameters, module._buffers)
    return any(name in names for names in kept) or hasattr(type(module), name)


def child(module: nn.Module, path: Path) -> nn.Module | None:
    """The module at `path`, None where there is none any more."""
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def refuse(reason: str):
    """Raises it."""
    raise Untraceable(reason)


def options_of(module: nn.Module) -> list[inspect.Parameter]:
    """The arguments of its forward that have a default."""
    return [p for p in inspect.signature(class_of(module).forward).parameters.values() if p.default is not p.empty]


def _trace(module, inlined, options=False):
    tracer = _Tracer(module, inlined, options)
    try:
        with _recording(tracer), _without_random_numbers():
            graph = tracer.trace(module)
        if tracer.watch.doubts:
            refuse(tracer.watch.doubts[0])
    except (Untraceable, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Untraceable(f"its forward cannot be traced: {first_line(error)}") from None
    reads = tuple(dict.fromkeys(tracer.reads))
    which = any(map(asks_which, tracer.watch.entered))
    return Trace(graph, reads, tracer.watch.found, tracer.inputs, tracer.asks_mode, which)


@contextlib.contextmanager
def _without_random_numbers():
    """Drawn ones would be constants of the graph; whoever draws next gets what they would have got."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
        drawn = random.getstate() != python or not torch.equal(torch.get_rng_state(), torchs)
        drawn |= np.random.get_state()[2:] != numpy[2:]  # each draw moves the position
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
    if drawn:
        raise Untraceable("its forward draws random numbers")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else what changes a buffer in place would do so now, and not in the graph

    def __init__(self, module, inlined, options):
        super().__init__(autowrap_modules=())
        self.options = options_of(module) if options else []
        self.paths = {id(m): tuple(name.split(".")) if name else () for name, m in module.named_modules()}
        self.inlined, self.inside = inlined, [()]
        self.reads: list[Read] = []
        self.inputs: tuple[str, ...] = ()
        self.asks_mode = False
        self.running = False  # forward is, rather than what fx does before
        self.watch: Watch | None = None
        self.around = _surroundings()

    def is_leaf_module(self, m, module_qualified_name):
        return module_qualified_name not in self.inlined

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        root_fn = class_of(self.root).forward  # not that of a fused one
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if any(p.kind is p.KEYWORD_ONLY for p in required):
            raise Untraceable("its forward has keyword-only arguments without a default")
        self.inputs = tuple(p.name for p in required)
        modules = [self.root, *(self.root.get_submodule(path) for path in self.inlined)]
        self.watch = Watch(modules, lambda: len(self.graph.nodes), refuse)
        options = {p.name: self.given(p) for p in self.options}

        @functools.wraps(root_fn)
        def watched(*args):
            with self.watch:
                return root_fn(*args, **options)

        self.running = True
        return watched, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.inputs)]

    def given(self, parameter):
        if isinstance(parameter.default, bool):
            return not parameter.default
        return self.create_proxy("placeholder", parameter.name, (), {})

    def call_module(self, m, forward, args, kwargs):
        self.inside.append(self.paths.get(id(m), ()))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.inside.pop()

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        running, self.running = self.running, False  # fx searches all parameters for this one
        try:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        finally:
            self.running = running

    def create_node(self, kind, *args, **kwargs):
        if _surroundings() != self.around:
            raise Untraceable("its forward runs a part of itself under no_grad, autocast, checkpointing or the like")
        node = super().create_node(kind, *args, **kwargs)
        # a leaf stands in the forward that calls it
        node.meta["scope"] = self.inside[-2] if kind == "call_module" else self.inside[-1]
        return node

    def create_arg(self, a):
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise Untraceable("its forward makes a tensor that does not come from its inputs")
        if type(a) is OrderedDict:  # fx would make a dict of it
            return self.create_node("call_function", OrderedDict, (self.create_arg([*map(list, a.items())]),), {})
        if isinstance(a, dict | list) and type(a) not in (dict, list, immutable_dict, immutable_list):
            raise Untraceable(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def proxy(self, node):
        return _Value(node, self)

    def to_bool(self, obj):
        return _without_an_answer(super().to_bool, obj)

    def iter(self, obj):
        return _without_an_answer(super().iter, obj)


def _without_an_answer(ask, value):
    # forward may catch an error, and go another way than with tensors
    try:
        return ask(value)
    except fx.proxy.TraceError as error:
        raise Untraceable(f"its forward cannot be traced: {first_line(error)}") from None


class _Value(fx.Proxy):
    def __float__(self):
        raise Untraceable("its forward makes a Python number of a value")

    __int__ = __index__ = __complex__ = __len__ = __float__

    def __getattr__(self, name):
        if self.node.op == "placeholder" and not name.startswith("_") and not hasattr(torch.Tensor, name):
            raise Untraceable(f"its forward asks an input for {name!r}, which no tensor has")
        return super().__getattr__(name)

    @property
    def __class__(self):  # where isinstance looks second
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", __package__)):
            return _Value
        raise Untraceable("its forward asks what type a value is")

    def __setattr__(self, name, value):
        if name not in ("tracer", "node"):
            raise Untraceable(f"its forward sets {name!r} of a value")
        super().__setattr__(name, value)


def _augmented(function):
    # fx knows none of them, so that Python would take `x = x + y` for `x += y`: whoever else holds x would miss the sum
    def apply(self, other):
        if function is None:
            raise Untraceable("its forward changes a value by a rare operator")
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in in_place.OTHERS:
    setattr(_Value, f"__{_name}__", _augmented(None))
for _function in in_place.FUNCTIONS:
    setattr(_Value, f"__{_function.__name__}__", _augmented(_function))


def _autocast_depth():
    """How many autocast contexts there are, those that turn it off as well."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _surroundings():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        _autocast_depth(),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


@contextlib.contextmanager
def _mode(module, inlined, training):
    """The modules whose forward is looked into, in one mode."""
    modules = [module, *(module.get_submodule(path) for path in inlined)]
    modes = [m.training for m in modules]
    try:
        for m in modules:
            object.__setattr__(m, "training", training)  # a module's own __setattr__ is not asked
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            object.__setattr__(m, "training", mode)


# of torch's own code, the parts that run on every call and so read what no forward asked for
_MACHINERY = {"__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"}


@contextlib.contextmanager
def _recording(tracer):
    """Within it every attribute that a forward reads from a module is written down, and none is set."""
    traced = {(), *(tuple(path.split(".")) for path in tracer.inlined)}

    def read(module, name):
        caller = sys._getframe(1)
        where = caller.f_globals.get("__name__", "")
        machinery = where.startswith(("torch.fx", __package__)) or (
            where == nn.Module.__module__ and caller.f_code.co_name in _MACHINERY
        )
        if name == "__dict__" and not machinery and tracer.running:
            raise Untraceable("its forward reads __dict__, and may find anything there")
        path = None if machinery or not tracer.running or name.startswith("__") else tracer.paths.get(id(module))
        if path is None or (name == "training" and path in traced):
            tracer.asks_mode |= path is not None
            return object.__getattribute__(module, name)
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:  # nn.Module.__getattr__ comes next
            tracer.reads.append(Read(path, name, _found_in_dicts(module, name)))
            raise
        tracer.reads.append(Read(path, name, _found(module, name, value)))
        tracer.watch.attribute(value)
        return value

    def no_setting(module, name, value):
        raise Untraceable(f"its forward sets the attribute {name!r}")

    setattr_of_torch = nn.Module.__setattr__
    nn.Module.__getattribute__, nn.Module.__setattr__ = read, no_setting
    try:
        yield
    finally:
        nn.Module.__setattr__ = setattr_of_torch
        del nn.Module.__getattribute__


def _found_in_dicts(module, name):
    """What nn.Module.__getattr__ is about to find."""
    attributes = object.__getattribute__(module, "__dict__")
    for kind in ("_modules", "_parameters", "_buffers"):
        if name in attributes.get(kind, ()):
            return _Found.NONE if attributes[kind][name] is None else _Found.PRESENT
    own = next(kind for kind in type(module).__mro__ if "__getattr__" in vars(kind))
    if own is not nn.Module:
        raise Untraceable(f"its forward reads {name!r}, for which {own.__name__} has a __getattr__")
    return _Found.ABSENT


def _found(module, name, value):
    if name == "_modules":
        return _Children(tuple(value))
    own = object.__getattribute__(module, "__dict__")
    if name not in own and (inspect.ismethod(value) or isinstance(getattr(type(module), name, None), property)):
        return _Found.OF_THE_CLASS
    if type(value) in (list, tuple, torch.Size) and all(isinstance(item, _CONSTANTS) for item in value):
        return tuple(value)
    if type(value) in (dict, OrderedDict) and all(isinstance(x, _CONSTANTS) for item in value.items() for x in item):
        return _Items(tuple(value.items()))
    if isinstance(value, _CONSTANTS):
        return value
    named = "<" not in getattr(value, "__qualname__", "<")  # found again by its name
    if callable(value) and named and (is_fixed(value) or isinstance(value.__self__, nn.Module)):
        return value
    raise Untraceable(f"its forward reads the attribute {name!r}, a {type(value).__name__}")


def _code(graph):
    return graph.python_code("self").src


def first_line(error: BaseException) -> str:
    """For a reason: its kind, and the beginning of what it says."""
    try:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    except Exception:
        return type(error).__name__
