"""Watches a forward during its trace: which functions run, what they read outside the module, and what they change.

A profile function sees each function on entry, before a line of it runs: it looks up what the bytecode reads, and
copies containers. After forward has returned, changes are restored, and the trace is refused.
"""

import functools
import gc
import sys
import types
import weakref

from torch import nn

from ..common.fused_class import class_of
from .by_name import any_name, asks_which, read_by_name
from .bytecode import reads, takes_nothing
from .outside import CONSTANTS, CONTAINERS, MISSING, Kept, Outside, Unknown, namespace, walk

_MADE_ANEW = (*CONSTANTS, types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)  # by some look-ups
_WITH_A_FUNCTION = {classmethod: "__func__", types.MethodType: "__func__", property: "fget"}
_APART = ("_find_and_load", "__del__")
_SETS_AN_ATTRIBUTE, CALLS_A_MODULE = nn.Module.__setattr__.__code__, nn.Module._wrapped_call_impl.__code__
_RECORDS = ("torch.fx.", "torch.nn.modules.", f"{__package__}.")
_ASKED = "torch.fx._symbolic_trace"  # whether torch.fx traces
# their attributes are determined by them, or covered by the recording of modules
_ENDS = (*CONSTANTS, *CONTAINERS, types.FunctionType, types.BuiltinFunctionType, nn.Module)
# their functions read their own state; what they draw or hold shows up where the model reads it
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"torch", "numpy", __name__.partition(".")[0]}


class Watch:
    """A context manager. It calls `refuse` with a reason, which raises."""

    def __init__(self, modules, known, nodes, refuse, originals):
        """modules: those whose forward is traced. nodes: returns the number of nodes of the graph so far.

        known: ids of all modules within. originals: of functions that are replaced while forward runs.
        """
        self.modules, self.known, self.nodes, self.refuse, self.originals = modules, known, nodes, refuse, originals
        self.asks_which = False  # whether code asks for a class, or compares identities
        self.outside: dict[tuple, Outside] = {}
        self.answers: dict[tuple, Outside] = {}
        self.doubts: list[str] = []  # reasons to refuse if there is no better one
        self.kept, self.before = Kept(), {}
        self.entered, self.within, self.asking = set(), set(), []
        self.apart = None  # the frame of an import or a finalizer, which is not part of forward
        self.routes: dict[types.CodeType, list] = {}  # function's code: where to find the function
        children = (child for module in modules for child in (module, *module._modules.values()))
        kinds = dict.fromkeys(kind for child in children for kind in class_of(child).__mro__)
        self.classes = [kind for kind in kinds if not is_library(kind.__module__)]
        for kind in self.classes:
            for name, value in vars(kind).items():
                self._route(value, kind, (name,))

    def __enter__(self):
        for module in self.modules:
            self.kept.keep(module.__dict__)
        self.collecting = gc.isenabled()
        gc.disable()  # its callbacks and finalizers are not part of forward
        self.previous = sys.getprofile()
        sys.setprofile(self._event)

    def __exit__(self, kind, error, traceback):
        sys.setprofile(None)
        if self.previous is not None:
            # a profiler in C is not a function
            enable = getattr(self.previous, "enable", None)
            enable() if enable else sys.setprofile(self.previous)
        if self.collecting:
            gc.enable()
        changed = self.kept.restore()
        for start, steps, value in self.before.values():
            now = walk(start, steps)
            if now is not value and not (isinstance(now, _MADE_ANEW) and type(now) is type(value) and now == value):
                changed = True
                _put_back(walk(start, steps[:-1]), steps[-1], value)
        if changed and kind is None:
            self.refuse("its forward changes something besides its tensors: a list, a dict, an attribute or a global")

    def _event(self, frame, event, argument):
        if self.apart is not None:
            if event == "return" and frame is self.apart:
                self.apart = None
            return
        if event == "call":
            if _records(frame.f_globals.get("__name__")) and frame.f_code not in (_SETS_AN_ATTRIBUTE, CALLS_A_MODULE):
                return
            if frame.f_code.co_name in _APART or _is_told_of_a_death(frame):
                self.apart = frame
                return
            if frame.f_code is _SETS_AN_ATTRIBUTE:
                self.refuse(f"its forward sets the attribute {frame.f_locals['name']!r}")
            elif frame.f_code is CALLS_A_MODULE and id(frame.f_locals["self"]) not in self.known:
                self.refuse("its forward calls a module that is none of its children")
            elif not _in_library(frame):
                self._enter(frame)
            elif self._is_asked_by_a_model(frame):
                self.asking.append((frame, self.nodes(), _arguments(frame)))
        elif event == "return" and self.asking and self.asking[-1][0] is frame:
            _, nodes, arguments = self.asking.pop()
            if nodes == self.nodes() and isinstance(argument, CONSTANTS) and argument is not None:
                function = _function(frame)
                if function is not None:
                    self._answered(function, arguments)
        elif event == "c_call" and not _in_library(frame) and _is_of_torch(argument):
            self.asking.append((argument, self.nodes(), () if takes_nothing(frame) else None))
        elif event == "c_exception" and self.asking and self.asking[-1][0] is argument:
            self.asking.pop()
        elif event == "c_return" and self.asking and self.asking[-1][0] is argument:
            _, nodes, arguments = self.asking.pop()
            if nodes == self.nodes():
                self._answered(argument, arguments)

    @staticmethod
    def _is_asked_by_a_model(frame):
        """Whether the frame is a function of torch, called by code outside torch."""
        name, caller = frame.f_globals.get("__name__", ""), frame.f_back
        if name.partition(".")[0] != "torch" or caller is None or _in_library(caller):
            return False
        return name == _ASKED or not f"{name}.".startswith(_RECORDS)

    def _answered(self, function, arguments):
        """Records an answer of torch, or a tensor that it made, that depends on no input."""
        name, module = function.__name__, sys.modules.get(function.__module__)
        known = arguments is not None and all(isinstance(argument, CONSTANTS) for argument in arguments)
        if known and getattr(module, name, None) is function:
            try:
                self.answers[module, name, arguments] = Outside(module, (), (name,), arguments)
                return
            except Unknown:
                pass
        self.doubts.append(f"its forward asks torch for {name}, and is decided by the answer")

    def _enter(self, frame):
        code = frame.f_code
        free = [name for name in code.co_freevars if name != "__class__"]
        if code in self.entered and not free:
            return
        self.entered.add(code)
        self.within.update(inner for inner in code.co_consts if isinstance(inner, types.CodeType))
        base = namespace(frame.f_globals)
        nested = code in self.within  # its closure belongs to a function that was entered
        route = self._found_again(frame, free) if (free and not nested) or code in self.routes else None
        self.asks_which |= asks_which(code)
        for kind, path in reads(code):
            if kind == "global" and path[0] in frame.f_globals:
                self._read(base, (), path, frame.f_globals)
            elif kind == "stored":
                self._note(frame.f_globals, path)
            elif route is not None and kind == "free" and path[0] in free and not nested:
                cell = ("__closure__", code.co_freevars.index(path[0]))
                self._read(route[0], (*route[1], *cell), ("cell_contents", *path[1:]))
        if route is not None:
            self._defaults(frame, *route)
        if name := any_name(code, frame.f_globals):
            self.refuse(f"its forward calls {name}, which may read anything")
        for owner, name in read_by_name(code, frame.f_globals, self.classes):
            self._read(owner, (), (name,), absent=True)

    def _found_again(self, frame, free):
        """Returns where to find the function that is entered."""
        for base, path in self.routes.get(frame.f_code, ()):
            function = walk(base, path)
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            if all(name in frame.f_locals and cells[name].cell_contents is frame.f_locals[name] for name in free):
                return base, path
        self.refuse(f"its forward calls {frame.f_code.co_name}, whose closure cannot be found again")
        return None

    def _defaults(self, frame, base, path):
        function = walk(base, path)
        named = function.__code__.co_varnames[: function.__code__.co_argcount]
        values = dict(zip(reversed(named), reversed(function.__defaults__ or ()), strict=False))
        for kind, given in (("__defaults__", values), ("__kwdefaults__", function.__kwdefaults__ or {})):
            taken = any(value is frame.f_locals.get(name) for name, value in given.items())
            if taken:
                self._read(base, path, (kind,))

    def _read(self, base, prefix, path, start=None, absent=False):
        start = walk(base, prefix) if start is None else start
        value, used = start, 0
        for step in path:  # as far as names lead through objects with no other state
            found = walk(value, (step,))
            if (found is MISSING and not absent) or (used and isinstance(value, _ENDS)):
                break
            value, used = found, used + 1
        path = path[:used]
        if not path or (id(start), path) in self.before:
            return
        self._note(start, path)
        self._route(value, base, (*prefix, *path))
        self.kept.keep(value)
        try:
            self.outside[id(start), path] = Outside(base, prefix, path, None, self._original(value))
        except Unknown as kind:
            names = [str(step) for step in path if step != "cell_contents"]
            self.refuse(f"its forward reads {'.'.join(names) or 'a variable of a closure'}, {kind}")

    def _original(self, value):
        return self.originals.get(value, MISSING) if isinstance(value, types.FunctionType) else MISSING

    def _note(self, start, path):
        self.before.setdefault((id(start), path), (start, path, walk(start, path)))

    def _route(self, value, base, path):
        """Registers the functions within a value that was found there."""
        if type(value) is staticmethod:
            self._route(value.__func__, base, path)  # what the class returns for its name
        elif type(value) in _WITH_A_FUNCTION:
            step = _WITH_A_FUNCTION[type(value)]
            self._route(getattr(value, step), base, (*path, step))
        elif isinstance(value, types.FunctionType):
            known = self.routes.setdefault(value.__code__, [])
            if len(known) > 8 or any(walk(*route) is value for route in known):
                return
            known.append((base, path))
            for i, cell in enumerate(value.__closure__ or ()):
                try:
                    self._route(cell.cell_contents, base, (*path, "__closure__", i, "cell_contents"))
                except ValueError:  # an empty cell
                    continue

    def attribute(self, value) -> None:
        """Records a value that forward has read from a module."""
        self.kept.keep(value)
        self._route(value, value, ())

    @property
    def found(self) -> tuple[Outside, ...]:
        return *self.outside.values(), *self.answers.values()


def _put_back(owner, step, value):
    if isinstance(owner, dict):
        if value is MISSING:
            owner.pop(step, None)
        else:
            owner[step] = value
    elif value is MISSING:
        delattr(owner, step)
    else:
        setattr(owner, step, value)


@functools.lru_cache(maxsize=1024)
def is_library(name):
    return name.partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=1024)
def _records(name):
    """Whether the named module builds the graph (the most frequent events): the model reads nothing there."""
    return name is not None and name != _ASKED and f"{name}.".startswith(_RECORDS)


def _in_library(frame):
    names = frame.f_globals
    # without builtins: a namespace that the standard library made for one function, such as a named tuple's
    return is_library(names.get("__name__") or "") or not names.get("__builtins__", True)


def _is_told_of_a_death(frame):
    """Whether it is a weak reference's callback, which Python may call at any point of forward."""
    count = frame.f_code.co_argcount
    if count not in (1, 2):  # as a method, with self
        return False
    given = frame.f_locals.get(frame.f_code.co_varnames[count - 1])
    return isinstance(given, weakref.ref) and given() is None


def _is_of_torch(function):
    # methods of torch's objects concern only these objects
    owner = getattr(function, "__self__", None)
    home = getattr(function, "__module__", None) or ""
    return home.partition(".")[0] == "torch" and (owner is None or isinstance(owner, types.ModuleType))


def _arguments(frame):
    code = frame.f_code
    if code.co_flags & (0x04 | 0x08) or code.co_kwonlyargcount:
        return None
    return tuple(frame.f_locals.get(name, MISSING) for name in code.co_varnames[: code.co_argcount])


def _function(frame):
    module = sys.modules.get(frame.f_globals["__name__"])
    function = getattr(module, frame.f_code.co_name, None)
    return function if getattr(function, "__code__", None) is frame.f_code else None  # a method
