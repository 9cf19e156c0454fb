"""Fuses a module by swapping its class for a subclass whose forward is ours.

The submodules, parameters, buffers and the instance's __dict__ are untouched: the class holds the fusion's data. So a
copy, deep or shallow, runs on its own weights (a forward bound to the instance would run on the original's),
`super().forward` is the original one, and swapping back leaves nothing behind.
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
    """Everything that identifies a fused class: enough to recreate it in another process."""

    original: type[nn.Module]  # the class that was swapped
    mixin: "type[Fused]"  # has the forward
    impl: str
    patterns: tuple[str, ...]  # those that forward may use, sorted
    program: Any = None  # of a generated forward, hashable
    # the methods that forward replaces; None takes the current ones
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
        # a replaced method may have no name to pickle, and may not exist in another process; the program does not
        # match the method that exists there instead
        methods = ((self.original, "forward", None, None),) if replaced(self.methods) else None
        return Recipe, (self.original, self.mixin, self.impl, self.patterns, self.program, methods)


# mixins precede a class that only `fused_class` knows, and use its attributes
_Original: Any = object


class Fused(_Original):
    """Base of the mixins, which provide `forward`: class FusedX(mixin, X)."""

    _rir_fusion: Recipe
    _rir_forward: Callable  # ours, even if the class's has been replaced

    def _rir_operations(self) -> list[tuple[str, str]]:
        """Returns (pattern, why it would not run fused now, or "") of each operation, by forward's own checks."""
        raise NotImplementedError

    def __init__(self, *args, **kwargs):
        # only called if an instance creates another of its class, as a slice of a Sequential does; the new one has
        # not been matched, so it gets the original class
        self.__class__ = self._rir_fusion.original  # type: ignore[assignment] # it leaves this class
        self.__init__(*args, **kwargs)  # type: ignore[misc] # of the class that it has now

    def __init_subclass__(cls, **kwargs):
        # hide fused classes from the original's __init_subclass__, which may register or reject subclasses
        if "_rir_fusion" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol):
        # deepcopy, copy and pickle cannot find the class by name, so they create an instance of the original class, in
        # that class's own way, and fuse it
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        recipe = self._rir_fusion
        build, arguments, *state = reduced
        build, *arguments = (recipe.original if part is type(self) else part for part in (build, *arguments))
        return (_rebuild, (recipe, build, tuple(arguments)), *state)


def swap_in(module, recipe: Recipe) -> None:
    """Fuses `module`, whose class is exactly recipe.original."""
    _set_class(module, fused_class(recipe))


def swap_back(module) -> None:
    """Gives a module that `is_fused` its original class back."""
    _set_class(module, module._rir_fusion.original)


def _set_class(module, cls):
    object.__setattr__(module, "__class__", cls)  # bypasses a module's own __setattr__
    # compiled functions may check a module's class only after a change of its dictionaries, up to torch 2.11 due to
    # torch._dynamo.config.use_recursive_dict_tags_for_guards; Python 3.13 doesn't detect a change of its __dict__
    attributes = module.__dict__
    for dictionary in (attributes, attributes.get("_parameters"), attributes.get("_modules")):
        if dictionary is not None:  # None in a module that is being constructed
            dictionary["_rir_swapped"] = None
            del dictionary["_rir_swapped"]


def is_fused(module) -> TypeGuard[Fused]:
    """Whether forward is ours; a class that something else swapped on top may override it."""
    return isinstance(module, Fused)


def is_covered(module) -> bool:
    """Whether something else has swapped the class of a fused module once more (FSDP, a parametrization)."""
    return is_fused(module) and "_rir_fusion" not in type(module).__dict__


def changed_class(module) -> str:
    """Returns why a fused module's class has changed, so that the original forward runs; or an empty string."""
    return replaced(module._rir_fusion.methods)


@functools.cache
def fused_class(recipe: Recipe) -> type:
    """Returns the fused class of a recipe."""
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

    # torch.compile counts recompilations per code object: don't share the count with other classes
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined] # functools.wraps hides the function
    # not the original's __module__: torch.compile omits guards for classes in torch.nn
    namespace = {"__module__": recipe.mixin.__module__, "__doc__": original.__doc__, "_rir_fusion": recipe}
    return subclass_of(original, recipe.mixin, namespace | helpers | {"forward": forward, "_rir_forward": forward})


def _rebuild(recipe, build, arguments):
    module = build(*arguments)
    if type(module) is recipe.original:
        swap_in(module, recipe)
    return module
