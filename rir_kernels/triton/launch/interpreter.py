"""Triton's interpreter: on NumPy 2.4 and later, and in half the time.

The interpreter holds a scalar of a kernel as an array of shape (1,), and converts it with int() wherever Python asks
for an index: `range`, slices. NumPy 2.4 converts only arrays without dimensions (triton-lang/triton#9171). Triton 3.7
squeezes the array first; `patch` has 3.6 do the same. The interpreter's other conversions use .item(), which NumPy
accepts.

It gives what a comparison finds the type of what was compared, so that a scalar condition becomes integers where it is
made as long as a block. Triton 3.9 refuses these as a mask: here a comparison is a boolean.

More than half of our kernels' time in it goes into two things that can be had for less. It puts its own functions in
the place of triton.language's for a launch, and looks all of them up again whenever the kernel calls a jitted function:
they are there already. And it does each integer operation again in 64 bits, in a dozen operations, to see
whether the first one overflowed, which it tells nobody unless its option `debug` is set.
"""

import functools

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def patch() -> None:
    """For the whole process, before the first kernel is interpreted."""
    if triton.__version__.startswith("3.6."):
        interpreter._patch_lang_tensor = functools.partial(_patch_lang_tensor, interpreter._patch_lang_tensor)
    interpreter._patch_lang = functools.partial(_patch_lang, interpreter._patch_lang)
    builder = interpreter.InterpreterBuilder
    builder.binary_op = functools.partialmethod(_binary_op, builder.binary_op)
    interpreter.TritonSemantic = _Semantic
    interpreter.interpreter_semantic = _Semantic(interpreter.interpreter_builder)


def _patch_lang_tensor(original, tensor, scope):
    # the interpreter calls it before each launch, and `scope` undoes it after
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _patch_lang(original, function):
    seen = [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]
    if seen and not any(tl.core.is_builtin(lang.program_id) for lang in seen):
        return interpreter._LangPatchScope()  # with nothing to undo
    return original(function)


def _binary_op(builder, original, lhs, rhs, op):
    result = original(builder, lhs, rhs, op)
    if result.data.dtype == bool:
        result.dtype = tl.int1
    return result


class _Semantic(TritonSemantic):
    def binary_op_sanitize_overflow_impl(self, lhs, rhs, binary_op):
        if self.builder.options.debug:
            super().binary_op_sanitize_overflow_impl(lhs, rhs, binary_op)
