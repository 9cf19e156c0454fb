"""Checks of constructor arguments, in one place so that the fused modules and the reference refuse the same things.

Every check raises ValueError, naming what it got and what it expected, and returns nothing. A call's arguments
(tensors, shapes, dtypes) are checked elsewhere; what torch's own constructors refuse is left to them.
"""

import functools
import inspect
import math
from numbers import Integral, Real

from .activations import normal_form

SHORTCUTS = ("pad", "projection", "none")
OUTER_SHORTCUTS = ("pre_norm", "post_act", "none")
OUTER_STREAMS = ("residual", "both")
RESIDUAL_AT = ("pre_norm", "post_norm")
OUR_KERNELS = ("hybrid", "triton")  # implementations that launch them, at least the norm's
IMPLS = ("auto", "reference", "torch", *OUR_KERNELS)


def _is_int(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def check_choice(name, value, choices):
    """Checks that `value` is one of `choices`."""
    # compare one by one: for a list or an array the error then names the argument, not "unhashable" or "ambiguous"
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive_int(name, value):
    """Checks that `value` is an int >= 1 (bool is not an int here)."""
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_int_or_pair(name, value, minimum):
    """Checks that `value` is an int >= `minimum`, or a pair of such ints."""
    values = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
    if not all(_is_int(v) and v >= minimum for v in values):
        raise ValueError(f"{name} must be an int >= {minimum} or a pair of such, got {value!r}")


def check_kernel_size(kernel_size):
    """Checks that `kernel_size` of RiRLayer is an odd positive int: padding k // 2 then keeps the image's size."""
    if not _is_int(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be an odd positive int, got {kernel_size!r}: "
            "the shortcut needs a convolution that keeps the image's size (1, 3, 5, ...)"
        )


def check_fraction(residual_fraction):
    """Checks that `residual_fraction` is a number within [0, 1]; both ends are allowed."""
    if not _is_number(residual_fraction) or not 0 <= residual_fraction <= 1:  # NaN fails the comparison
        raise ValueError(
            f"residual_fraction must be a number within [0, 1], got {residual_fraction!r}: "
            "it is the part of the channels that the residual stream takes"
        )


def check_branch_scale(branch_scale):
    """Checks that `branch_scale` is a finite number."""
    if not _is_number(branch_scale) or not math.isfinite(branch_scale):
        raise ValueError(f"branch_scale must be a finite number, got {branch_scale!r}: 1.0 leaves the branch as it is")


def check_eps(eps):
    """Checks that `eps` is a finite number above zero."""
    if not _is_number(eps) or not (0 < eps < math.inf):
        raise ValueError(f"eps must be a positive number, got {eps!r}: BatchNorm2d's own default is 1e-5")


def check_momentum(momentum):
    """Checks that `momentum` is a number, or None for the cumulative average; as in torch, its range is not limited."""
    if momentum is not None and not _is_number(momentum):
        raise ValueError(f"momentum must be a number, or None for the cumulative average, got {momentum!r}")


def check_layer(
    in_channels, out_channels, *, kernel_size, stride, residual_fraction, shortcut, branch_scale, eps, momentum
):
    """Checks the arguments of RiRLayer."""
    check_positive_int("in_channels", in_channels)
    check_positive_int("out_channels", out_channels)
    check_kernel_size(kernel_size)
    check_positive_int("stride", stride)
    check_fraction(residual_fraction)
    check_choice("shortcut", shortcut, SHORTCUTS)
    check_branch_scale(branch_scale)
    check_eps(eps)
    check_momentum(momentum)


def check_block(num_layers, *, outer_shortcut, outer_streams):
    """Checks the arguments of RiRBlock that its layers do not check."""
    check_positive_int("num_layers", num_layers)
    check_choice("outer_shortcut", outer_shortcut, OUTER_SHORTCUTS)
    check_choice("outer_streams", outer_streams, OUTER_STREAMS)


def check_conv_bn_act(
    in_channels,
    out_channels,
    kernel_size,
    *,
    stride,
    padding,
    dilation,
    groups,
    residual_at,
    branch_scale,
    activation,
    eps,
    momentum,
):
    """Checks the arguments of ConvBNAct; `padding` is as passed and may be None."""
    check_positive_int("in_channels", in_channels)
    check_positive_int("out_channels", out_channels)
    check_int_or_pair("kernel_size", kernel_size, 1)
    check_int_or_pair("stride", stride, 1)
    if padding is not None:
        check_int_or_pair("padding", padding, 0)
    check_int_or_pair("dilation", dilation, 1)
    check_positive_int("groups", groups)  # Conv2d checks that it divides the channels
    check_choice("residual_at", residual_at, RESIDUAL_AT)
    check_branch_scale(branch_scale)
    normal_form(activation)
    check_eps(eps)
    check_momentum(momentum)


def unplaced(residuals) -> TypeError:
    """Returns the error for a residual or a branch_scale without residual_at, which selects one of two functions."""
    name = "residual" if residuals else "branch_scale"
    return TypeError(
        f'a {name} needs residual_at: "pre_norm" (the norm sees the sum, as in RiR) or '
        '"post_norm" (the sum follows the norm, as in an ordinary ResNet)'
    )


def named_from(count):
    """Decorates a function whose arguments after the first `count` are keyword-only: the error of a call that passes
    them by position shows how to write it."""

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **options):
            if len(args) > count:
                parameters = list(inspect.signature(function).parameters)
                named = ", ".join(f"{name}=..." for name in parameters[count : len(args)])
                raise TypeError(
                    f"{function.__name__} takes {count} positional argument{'s' * (count > 1)}, got {len(args)}: write "
                    f"{function.__name__}({', '.join(parameters[:count])}, {named})"
                )
            return function(*args, **options)

        return call

    return decorate
