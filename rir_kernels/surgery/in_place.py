"""x += y and similar as functions: fx generates statements, which rebind a name that later lines may read."""

import operator


def iadd(x, y):
    return operator.iadd(x, y)


def isub(x, y):
    return operator.isub(x, y)


def imul(x, y):
    return operator.imul(x, y)


def itruediv(x, y):
    return operator.itruediv(x, y)


FUNCTIONS = {getattr(operator, f.__name__): f for f in (iadd, isub, imul, itruediv)}
OTHERS = ("ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift")
