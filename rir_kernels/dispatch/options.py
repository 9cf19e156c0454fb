"""Checks the options of one call and builds its spec."""

import functools

import torch

from ..common.activations import normal_form
from ..common.arguments import (
    RESIDUAL_AT,
    check_branch_scale,
    check_choice,
    check_eps,
    check_int_or_pair,
    check_positive_int,
)
from ..common.spec import ConvBNActSpec


def checked_spec(residual_at, branch_scale, stride, padding, dilation, groups, eps, activation) -> ConvBNActSpec:
    """Builds the spec of a call's options; residual_at None: there is nothing to place.

    Raises ValueError, naming the option, its value and what is allowed.
    """
    if residual_at is not None:
        check_choice("residual_at", residual_at, RESIDUAL_AT)
    activation = normal_form(activation)
    check_branch_scale(branch_scale)
    check_eps(eps)
    check_int_or_pair("stride", stride, 1)
    check_int_or_pair("padding", padding, 0)
    check_int_or_pair("dilation", dilation, 1)
    check_positive_int("groups", groups)
    return ConvBNActSpec(
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        post_norm=residual_at == "post_norm",
        branch_scale=float(branch_scale),
        eps=float(eps),
        activation=activation,
    )


_kept = functools.lru_cache(maxsize=1024, typed=True)(checked_spec)


def build_spec(*options) -> ConvBNActSpec:
    """Calls `checked_spec`, cached for equal options of the same types."""
    # torch.compile traces through a cache and warns of it; a cache ignores types within a pair: (True, 1) is (1, 1)
    if torch.compiler.is_compiling() or tuple in map(type, options) or list in map(type, options):
        return checked_spec(*options)
    try:
        return _kept(*options)
    except TypeError:  # unhashable
        return checked_spec(*options)


def _pair(value) -> tuple[int, int]:
    h, w = value if isinstance(value, (tuple, list)) else (value, value)
    return int(h), int(w)
