"""How a module is fused: its class becomes a subclass of itself whose forward is ours.

The submodules, parameters, buffers and the instance's __dict__ are untouched: what the fusion needs to know stands in
the class. So a copy, deep or shallow, runs on its own weights (a forward bound to the instance would run on the
original's), `super().forward` is the original one, and swapping back leaves nothing behind.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """All that tells a fused class from others: enough to make it again in another process."""

    original: type  # the class that was swapped
    mixin: type  # a Fused, with the forward
    impl: str
    patterns: tuple[str, ...]  # those that forward may use, sorted
    program: Hashable = None  # of a forward that is generated


class Fused:
    """Base of the mixins, which bring `forward`: class FusedX(mixin, X)."""

    _rir_fusion: Recipe

    def __init__(self, *args, **kwargs):
        # only ever called where an instance asks for another of its class, as a slice of a Sequential does; nobody
        # has matched that one, so it is of the original class
        self.__class__ = self._rir_fusion.original
        self.__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # deepcopy, copy and pickle: the class is not found by its name, so it is made again
        return (_rebuild, (self._rir_fusion,), *super().__reduce_ex__(protocol)[2:])


def swap_in(module, recipe: Recipe) -> None:
    """Fuse `module`, whose class is exactly recipe.original."""
    _set_class(module, fused_class(recipe))


def swap_back(module) -> None:
    """The reverse, for a module that `is_fused`."""
    _set_class(module, module._rir_fusion.original)


def _set_class(module, cls):
    object.__setattr__(module, "__class__", cls)  # a module's own __setattr__ is not asked
    # compiled functions may look at a module's class only after a change of its __dict__: torch 2.11's
    # torch._dynamo.config.use_recursive_dict_tags_for_guards
    attributes = module.__dict__
    attributes["_rir_swapped"] = True
    del attributes["_rir_swapped"]


def is_fused(module) -> bool:
    """Whether forward is ours; a class that something else swapped on top may override it."""
    return isinstance(module, Fused)


def class_of(module) -> type:
    """The module's class, of a fused one that which was swapped."""
    return module._rir_fusion.original if is_fused(module) else type(module)


def is_covered(module) -> bool:
    """Whether something else has swapped the class of a fused module once more (FSDP, a parametrization)."""
    return is_fused(module) and "_rir_fusion" not in type(module).__dict__


@functools.cache
def fused_class(recipe: Recipe) -> type:
    """The class of modules that are fused so. Whatever a base class raises for its subclasses."""
    name = f"Fused{recipe.original.__name__}"
    # not the original's __module__: torch.compile leaves out guards for what calls itself a part of torch.nn
    namespace = {"__module__": recipe.mixin.__module__, "__doc__": recipe.original.__doc__, "_rir_fusion": recipe}
    if recipe.program is not None:
        namespace["forward"] = recipe.program.forward(recipe.original)
    return type(name, (recipe.mixin, recipe.original), namespace)


def _rebuild(recipe):
    module = recipe.original.__new__(recipe.original)
    swap_in(module, recipe)
    return module
