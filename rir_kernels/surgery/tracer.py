"""torch.fx's tracer for one run of one forward: children are opaque, and what a graph cannot represent is refused.

fx.Tracer.trace patches nn.Module's methods, which invalidates Python's type caches of all its subclasses. Here the
modules' own classes report attribute look-ups instead, see `recording`.
"""

import contextlib
import inspect
import sys
from collections import OrderedDict

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ..common.fused_class import class_of
from . import in_place
from .reads import Found, Path, Read, found, found_in_dicts, path_of
from .recording import recording, refuse
from .watch import CALLS_A_MODULE, Watch, is_library

# parts of torch that run on every call, and read attributes that no forward asked for
_MACHINERY = {"__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"}


class Tracer(fx.Tracer):
    """Traces a forward. reads: the attributes it has read; inputs: the names of its arguments without a default."""

    def __init__(self, module: nn.Module, inlined: frozenset[str], options: bool):
        super().__init__(autowrap_modules=())  # type: ignore[arg-type] # fx's type is of one module, and means any number
        self.root, self.inlined = module, inlined
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs = {}  # fx would treat tensors in plain attributes as constants
        self.submodule_paths = {m: name for name, m in module.named_modules()}
        self.paths = {id(m): path_of(name) if name else () for m, name in self.submodule_paths.items()}
        self.traced = {(), *map(path_of, inlined)}
        self.tensors = {id(p): name for name, p in (*module.named_buffers(), *module.named_parameters())}
        self.taken: dict[str, fx.Proxy] = {}  # parameters and buffers
        self.inside: list[Path] = [()]
        self.reads: list[Read] = []
        self.refusals: list[str] = []
        self.asks_mode = False
        self.around = surroundings()
        parameters = list(inspect.signature(class_of(module).forward).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if any(p.kind is p.KEYWORD_ONLY for p in required):
            refuse("its forward has keyword-only arguments without a default")
        self.inputs = tuple(p.name for p in required)
        self.options = options_of(module) if options else []

    def run(self) -> fx.Graph:
        """Traces the original forward, not a fused one. Raises Untraceable, or what forward raises."""
        forward = class_of(self.root).forward
        if not inspect.isfunction(forward):
            refuse(f"its forward is a {type(forward).__name__}, and no function")
        with _opaque_functions() as originals:
            modules = [self.root, *(self.root.get_submodule(path) for path in self.inlined)]
            self.watch = Watch(modules, self.paths, lambda: len(self.graph.nodes), refuse, originals)
            inputs = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]
            options = {p.name: self.given(p) for p in self.options}
            with recording(self, self.submodule_paths or ()), self.watch:
                self.create_node("output", "output", (self.create_arg(forward(self.root, *inputs, **options)),), {})
        if self.refusals:
            refuse(self.refusals[0])
        return self.graph

    def look_up(self, module: nn.Module, name: str):
        """Returns module.name as Python finds it, and records it if forward asks."""
        frame, plain = sys._getframe(2), object.__getattribute__
        code, where = frame.f_code, frame.f_globals.get("__name__", "")
        if code is CALLS_A_MODULE and name == "_compiled_call_impl":
            return None
        if code is CALLS_A_MODULE and name == "_call_impl":
            forward = plain(module, name)
            return lambda *args, **kwargs: self.call_module(module, forward, args, kwargs)
        machinery = where.startswith(("torch.fx", __package__)) or (
            where == nn.Module.__module__ and code.co_name in _MACHINERY
        )
        path = None if machinery else self.paths.get(id(module))
        if path is None or name.startswith("__"):
            if path is not None and name == "__dict__" and not is_library(where):
                refuse("its forward reads the __dict__ of a module")
            self.watch.asks_which |= path is not None and name == "__class__" and not where.startswith("torch.")
            return plain(module, name)
        if name == "training" and path in self.traced:
            self.asks_mode = True
            return plain(module, name)
        try:
            value = plain(module, name)
        except AttributeError:  # nn.Module.__getattr__ comes next
            what, value = found_in_dicts(module, name)
            self.reads.append(Read(path, name, what))
            if what is Found.ABSENT or type(module).__getattr__ is not nn.Module.__getattr__:
                raise
            return self.proxied(value)
        self.reads.append(Read(path, name, found(module, name, value)))
        self.watch.attribute(value)
        return value

    def proxied(self, value):
        """Returns a parameter or buffer of the root or its children as its only node; anything else unchanged."""
        name = self.tensors.get(id(value)) if isinstance(value, torch.Tensor) else None
        if name is None:
            return value
        if name not in self.taken:
            self.taken[name] = self.create_proxy("get_attr", name, (), {})
        return self.taken[name]

    def given(self, parameter):
        if isinstance(parameter.default, bool):
            return not parameter.default
        return self.create_proxy("placeholder", parameter.name, (), {})

    def is_leaf_module(self, m, module_qualified_name):
        return module_qualified_name not in self.inlined

    def call_module(self, m, forward, args, kwargs):
        self.inside.append(self.paths.get(id(m), ()))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.inside.pop()

    def create_node(self, kind, *args, **kwargs):
        if surroundings() != self.around:
            refuse("its forward runs a part of itself under no_grad, autocast, checkpointing or the like")
        node = super().create_node(kind, *args, **kwargs)
        # a leaf belongs to the forward that calls it
        node.meta["scope"] = self.inside[-2] if kind == "call_module" else self.inside[-1]
        return node

    def create_arg(self, a):
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            refuse("its forward makes a tensor that does not come from its inputs")
        if type(a) is OrderedDict:  # fx would convert it to a dict
            return self.create_node("call_function", OrderedDict, (self.create_arg([*map(list, a.items())]),), {})
        if isinstance(a, dict | list) and type(a) not in (dict, list, immutable_dict, immutable_list):
            refuse(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def proxy(self, node):
        return _Value(node, self)

    def to_bool(self, obj):
        return _without_an_answer(super().to_bool, obj)

    def iter(self, obj):
        return _without_an_answer(super().iter, obj)


def options_of(module: nn.Module) -> list[inspect.Parameter]:
    """Returns the arguments of its forward that have a default."""
    return [p for p in inspect.signature(class_of(module).forward).parameters.values() if p.default is not p.empty]


def first_line(error: BaseException) -> str:
    """Formats an error for a reason: its class, and the first line of its message."""
    try:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    except Exception:
        return type(error).__name__


@contextlib.contextmanager
def _opaque_functions():
    """Makes functions registered with torch.fx.wrap nodes, and tells torch's functions that fx traces.

    Yields the replacements of these functions with the originals.
    """
    with _fx_traces(), _symbolic_trace._new_patcher() as patcher:
        _symbolic_trace._patch_wrapped_functions(patcher)
        yield {patch.new_fn: patch.orig_fn for patch in patcher.patches_made}


@contextlib.contextmanager
def _fx_traces():
    if hasattr(_symbolic_trace, "_is_fx_tracing_context"):  # torch 2.14 and later: this thread traces
        with _symbolic_trace._is_fx_tracing_context(True):
            yield
        return
    before = _symbolic_trace._is_fx_tracing_flag
    _symbolic_trace._is_fx_tracing_flag = True
    try:
        yield
    finally:
        _symbolic_trace._is_fx_tracing_flag = before


def _without_an_answer(ask, value):
    # forward may catch an error, and take another path than with tensors
    try:
        return ask(value)
    except fx.proxy.TraceError as error:
        return refuse(f"its forward cannot be traced: {first_line(error)}")


class _Value(fx.Proxy):
    def __float__(self):
        refuse("its forward makes a Python number of a value")

    __int__ = __index__ = __complex__ = __len__ = __float__

    def __getattr__(self, name):
        if self.node.op == "placeholder" and not name.startswith("_") and not hasattr(torch.Tensor, name):
            refuse(f"its forward asks an input for {name!r}, which no tensor has")
        return super().__getattr__(name)

    @property  # type: ignore[misc] # an object's __class__ can be set, and this one cannot
    def __class__(self):  # isinstance reads it after type()
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", __package__)):
            return _Value
        refuse("its forward asks what type a value is")

    def __setattr__(self, name, value):
        if name not in ("tracer", "node"):
            refuse(f"its forward sets {name!r} of a value")
        super().__setattr__(name, value)


def _augmented(function):
    # fx has none of these, so Python would run `x = x + y` for `x += y`, and other references to x would miss the sum
    def apply(self, other):
        if function is None:
            refuse("its forward changes a value by a rare operator")
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in in_place.OTHERS:
    setattr(_Value, f"__{_name}__", _augmented(None))
for _function in in_place.FUNCTIONS:
    setattr(_Value, f"__{_function.__name__}__", _augmented(_function))


def _autocast_depth():
    """Returns the number of nested autocast contexts, including those that disable it."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def surroundings():
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
