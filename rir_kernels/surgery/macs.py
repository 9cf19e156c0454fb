"""Counts the multiply-adds of a model's forward, and the share of fused convolutions."""

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
    """Returns the share of fused convolutions in all convolutions and matrix products of one forward; 0.0 if none.

    Runs a copy of the model without the user's hooks. Raises what the model raises.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()
    for module in ledger.own:
        layer: Any = twin.get_submodule(ledger.names[module][0])
        layer.impl = "reference"  # the other implementations' operations are not counted
    # a projection within a layer counts separately; torch.jit allows no hooks, and what it compiled is not fused
    measured = {m for m in (*ledger.convolutions(), *ledger.own) if not isinstance(m, torch.jit.ScriptModule)}
    spent = {module: twin.get_submodule(ledger.names[module][0]) for module in measured}
    with _undisturbed(), FlopCounterMode(display=False) as counter:
        counts = _watched(spent.values(), counter)
        twin(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
    total = counter.get_total_flops()
    fused = sum(counts[spent[module]] for module in measured if module in ledger.covered or module in ledger.own)
    return fused / total if total else 0.0


def _watched(modules, counter):
    """Counts each module's own work; the hooks for it keep fused modules from bypassing it."""
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
    """Disables gradients and warnings, and restores all random states on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    attention = torch.backends.mha.get_fastpath_enabled()
    try:
        with contextlib.ExitStack() as stack:
            for context in (
                warnings.catch_warnings(),
                undisturbed(),
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),  # runs attention as products that are counted
            ):
                stack.enter_context(context)
            torch.backends.mha.set_fastpath_enabled(False)
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        random.setstate(python)
        np.random.set_state(numpy)
