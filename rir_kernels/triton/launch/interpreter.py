"""Patches Triton's interpreter to work on NumPy 2.4 and later, and to take half the time.

The interpreter holds a kernel's scalar as an array of shape (1,), and converts it with int() wherever Python needs an
index: `range`, slices. NumPy 2.4 converts only arrays without dimensions (triton-lang/triton#9171). Triton 3.7
squeezes the array first; `patch` makes 3.6 do the same. The interpreter's other conversions use .item(), which NumPy
accepts.

It gives the result of a comparison the dtype of its operands, so a scalar condition becomes integers when it is
broadcast to a block. Triton 3.9 rejects these as a mask; with the patch a comparison yields a boolean.

Our kernels spend more than half of their time in it on two things that can be cheaper. It replaces triton.language's
functions with its own for a launch, and looks all of them up again on every call of a jitted function, although they
are already in place. And it repeats each integer operation in 64 bits, in a dozen operations, to check the first one
for overflow, which it reports only if its option `debug` is set.
"""

import functools

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def patch() -> None:
    """Patches the whole process; to be called before the first kernel is interpreted."""
    if triton.__version__.startswith("3.6."):
        interpreter._patch_lang_tensor = functools.partial(_patch_lang_tensor, interpreter._patch_lang_tensor)
    interpreter._patch_lang = functools.partial(_patch_lang, interpreter._patch_lang)
    builder = interpreter.InterpreterBuilder
    builder.binary_op = functools.partialmethod(_binary_op, builder.binary_op)
    interpreter.TritonSemantic = _Semantic
    interpreter.interpreter_semantic = _Semantic(interpreter.interpreter_builder)


def _patch_lang_tensor(original, tensor, scope):
    # the interpreter calls this before each launch, and `scope` undoes it afterwards
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _patch_lang(original, function):
    seen = [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]
    if seen and not any(tl.core.is_builtin(lang.program_id) for lang in seen):
        return interpreter._LangPatchScope()  # has nothing to undo
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
