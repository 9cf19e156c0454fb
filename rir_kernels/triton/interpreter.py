"""Lets Triton 3.6's interpreter run on NumPy 2.4 and later.

The interpreter holds a scalar of a kernel as an array of shape (1,), and converts it with int() wherever Python asks
for an index: `range`, slices. NumPy 2.4 converts only arrays without dimensions (triton-lang/triton#9171). Triton 3.7
squeezes the array first; `patch` has 3.6 do the same. The interpreter's other conversions use .item(), which NumPy
accepts.
"""

import functools

import triton
from triton.runtime import interpreter


def patch() -> None:
    """For the whole process, before the first kernel is interpreted. Other versions of Triton are left alone."""
    if triton.__version__.startswith("3.6."):
        interpreter._patch_lang_tensor = functools.partial(_patch_lang_tensor, interpreter._patch_lang_tensor)


def _patch_lang_tensor(original, tensor, scope):
    # the interpreter calls it before each launch, and `scope` undoes it after
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
