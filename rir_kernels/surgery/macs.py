"""Multiply-adds of a model's forward: which share of them fused convolutions have."""

import contextlib
import copy
import random
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.random_state import undisturbed
from .coverage import Ledger

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def macs_share(model: nn.Module, ledger: Ledger, inputs: tuple[torch.Tensor | None, ...]) -> float:
    """Of all convolutions and matrix products in one forward, the part in fused convolutions; 0.0 where there is none.

    Runs a copy of the model, without the hooks of its user. Raises what the model raises.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()
    for module in ledger.own:
        layer: Any = twin.get_submodule(ledger.names[module][0])
        layer.impl = "reference"  # the operations of the others count as nothing
    # a projection within a layer is not the layer's; torch.jit allows no hooks, and what it compiled is not fused
    measured = {m for m in (*ledger.convolutions(), *ledger.own) if not isinstance(m, torch.jit.ScriptModule)}
    spent = {module: twin.get_submodule(ledger.names[module][0]) for module in measured}
    with _undisturbed(), FlopCounterMode(display=False) as counter:
        counts = _watched(spent.values(), counter)
        twin(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
    total = counter.get_total_flops()
    fused = sum(counts[spent[module]] for module in measured if module in ledger.covered or module in ledger.own)
    return fused / total if total else 0.0


def _watched(modules, counter):
    """A count by module, of what each spends itself: its hooks keep fused modules from running around it."""
    counts: Counter[nn.Module] = Counter()
    around: list[list[int]] = []

    def before(module, inputs):
        around.append([counter.get_total_flops(), 0])

    def after(module, inputs, output):
        start, within = around.pop()
        spent = counter.get_total_flops() - start
        counts[module] += spent - within
        if around:
            around[-1][1] += spent

    for module in modules:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return counts


@contextlib.contextmanager
def _undisturbed():
    """No gradients, no warnings, and all random states are given back."""
    python, numpy = random.getstate(), np.random.get_state()
    attention = torch.backends.mha.get_fastpath_enabled()
    try:
        with contextlib.ExitStack() as stack:
            for context in (
                warnings.catch_warnings(),
                undisturbed(),
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),  # attention as products that are counted
            ):
                stack.enter_context(context)
            torch.backends.mha.set_fastpath_enabled(False)
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        random.setstate(python)
        np.random.set_state(numpy)
