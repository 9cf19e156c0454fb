"""How a module is fused: its class becomes a subclass of itself whose forward is ours.

The submodules, parameters, buffers and the instance's __dict__ are untouched: what the fusion needs to know stands in
the class. So a copy, deep or shallow, runs on its own weights (a forward bound to the instance would run on the
original's), `super().forward` is the original one, and swapping back leaves nothing behind.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from .classes import Method, methods_of, replaced, subclass_of
from .fallback import note
from .pattern_names import pattern_name


@dataclass(frozen=True)
class Recipe:
    """All that tells a fused class from others: enough to make it again in another process."""

    original: type[nn.Module]  # the class that was swapped
    mixin: "type[Fused]"  # with the forward
    impl: str
    patterns: tuple[str, ...]  # those that forward may use, sorted
    program: Any = None  # of a forward that is generated, hashable
    # those that forward stands for; None takes them as they are now
    methods: tuple[Method, ...] = None  # type: ignore[assignment] # it is never None once __post_init__ has run

    def __post_init__(self):
        object.__setattr__(self, "patterns", tuple(sorted(map(pattern_name, self.patterns))))  # codes in old pickles
        if self.methods is None:
            also = () if self.program is None else self.program.methods(self.original)
            found = dict.fromkeys((*methods_of(self.original, "forward"), *also))
            object.__setattr__(self, "methods", tuple(found))

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        # a method that was replaced may have no name to be pickled by, nor be there in another process; nor does the
        # program stand for the one that is there instead
        methods = ((self.original, "forward", None, None),) if replaced(self.methods) else None
        return Recipe, (self.original, self.mixin, self.impl, self.patterns, self.program, methods)


# mixins stand before a class that only `fused_class` knows, and use its attributes
_Original: Any = object


class Fused(_Original):
    """Base of the mixins, which bring `forward`: class FusedX(mixin, X)."""

    _rir_fusion: Recipe
    _rir_forward: Callable  # ours, wherever the class has another one by now

    def _rir_operations(self) -> list[tuple[str, str]]:
        """(pattern, why it would not run fused now or an empty string) of each operation, as forward asks it."""
        raise NotImplementedError

    def __init__(self, *args, **kwargs):
        # only ever called where an instance asks for another of its class, as a slice of a Sequential does; nobody
        # has matched that one, so it is of the original class
        self.__class__ = self._rir_fusion.original  # type: ignore[assignment] # it leaves this class
        self.__init__(*args, **kwargs)  # type: ignore[misc] # of the class that it has now

    def __init_subclass__(cls, **kwargs):
        # a fused class is not for the original's to see: it may write down, or refuse, what it takes for a user's
        if "_rir_fusion" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol):
        # deepcopy, copy and pickle: the class is not found by its name, so one of the original class is made, as that
        # class says, and fused
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        recipe = self._rir_fusion
        build, arguments, *state = reduced
        build, *arguments = (recipe.original if part is type(self) else part for part in (build, *arguments))
        return (_rebuild, (recipe, build, tuple(arguments)), *state)


def swap_in(module, recipe: Recipe) -> None:
    """Fuse `module`, whose class is exactly recipe.original."""
    _set_class(module, fused_class(recipe))


def swap_back(module) -> None:
    """The reverse, for a module that `is_fused`."""
    _set_class(module, module._rir_fusion.original)


def _set_class(module, cls):
    object.__setattr__(module, "__class__", cls)  # a module's own __setattr__ is not asked
    # compiled functions may look at a module's class only after a change of its dictionaries, up to torch 2.11 by
    # torch._dynamo.config.use_recursive_dict_tags_for_guards; under Python 3.13 a change of its __dict__ goes unseen
    attributes = module.__dict__
    for dictionary in (attributes, attributes.get("_parameters"), attributes.get("_modules")):
        if dictionary is not None:  # a module that is being made has none yet
            dictionary["_rir_swapped"] = None
            del dictionary["_rir_swapped"]


def is_fused(module) -> TypeGuard[Fused]:
    """Whether forward is ours; a class that something else swapped on top may override it."""
    return isinstance(module, Fused)


def is_covered(module) -> bool:
    """Whether something else has swapped the class of a fused module once more (FSDP, a parametrization)."""
    return is_fused(module) and "_rir_fusion" not in type(module).__dict__


def changed_class(module) -> str:
    """Why the class of a fused module is not what it was, so that the original forward runs; or an empty string."""
    return replaced(module._rir_fusion.methods)


@functools.cache
def fused_class(recipe: Recipe) -> type:
    """The class of modules that are fused so."""
    original, methods = recipe.original, recipe.methods
    program = recipe.program
    fused = getattr(recipe.mixin, "forward", original.forward) if program is None else program.forward(original)
    helpers = {} if program is None else program.helpers()

    @functools.wraps(original.forward)
    def forward(module, *args, **kwargs):
        if reason := replaced(methods):
            note(module, (*args, *kwargs.values()), reason, asked=False)
            return original.forward(module, *args, **kwargs)
        return fused(module, *args, **kwargs)

    # torch.compile counts recompilations by code object: those of other classes are none of this one's
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined] # functools.wraps hides the function
    # not the original's __module__: torch.compile leaves out guards for what calls itself a part of torch.nn
    namespace = {"__module__": recipe.mixin.__module__, "__doc__": original.__doc__, "_rir_fusion": recipe}
    return subclass_of(original, recipe.mixin, namespace | helpers | {"forward": forward, "_rir_forward": forward})


def _rebuild(recipe, build, arguments):
    module = build(*arguments)
    if type(module) is recipe.original:
        swap_in(module, recipe)
    return module
