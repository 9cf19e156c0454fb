"""What candidates are compared with: the reference's own runs, and its golden in float64."""

import contextlib
import copy
import dataclasses

import torch
from torch import nn

from ..common.random_state import seed_all
from ..dispatch.preference import use_impl
from ..modules import ConvBNAct, RiRLayer
from ..surgery.class_swap import is_covered, is_fused, swap_in
from .criterion import GRADIENTS, is_floating, judge_all
from .report import EquivalenceRow
from .runs import Run, run


class Yardstick:
    """Runs the reference on one set of inputs, in one mode, and judges any number of candidates. Works on copies.

    gradients: whether to run backward; if not, forward runs under no_grad, as inference does.
    """

    def __init__(self, reference: nn.Module, inputs: tuple, train: bool, *, gradients: bool = True):
        self._inputs, self._train, self._gradients = inputs, train, gradients
        self._reference = reference
        self.given = [run(reference, inputs, train, gradients=gradients)]
        if not self.given[0].is_random:  # in the other format random numbers would hit other elements
            self.given += _run_in_other_format(reference, inputs, train, gradients)
        self._golden = _golden(reference)
        self._widened = tuple(x.double() if is_floating(x) else x for x in inputs)
        self._exact = self._run_golden(self._golden, self._widened)
        self._moved: list[Run] | None = None

    def judge(self, result: Run) -> list[EquivalenceRow]:
        """Returns a row for every tensor; `criterion` explains how."""
        rows = judge_all(self.given, self._exact, result)
        if any(row.kind in GRADIENTS and not row.passed and row.budget is not None for row in rows):
            rows = judge_all(self.given, self._exact, result, self._moved_runs())
        return rows

    def _moved_runs(self):
        """Runs the golden on data within rounding of the given data."""
        if self._moved is None:
            amount = _amount(self._reference, self._inputs, self.given[0])
            self._moved = [
                self._run_golden(*_moved(self._golden, self._widened, sign * amount, seed))
                for seed in (1, 2)
                for sign in (1, -1)
            ]
        return self._moved

    def _run_golden(self, golden, inputs):
        with use_impl("torch"):
            return run(golden, inputs, self._train, gradients=self._gradients)


def _run_in_other_format(module, inputs, train, gradients):
    """Runs with images and weights channels_last instead of contiguous, or the reverse; no run if there are none.

    On a CPU without oneDNN: its gradient of a strided 1x1 writes past its workspace if channels_last images have few
    channels (uxlfoundation/oneDNN#6035), and the caller did not choose this format.
    """
    module = copy.deepcopy(module)
    images = [x for x in inputs if is_floating(x) and x.dim() == 4]
    weights = [parameter for parameter in module.parameters() if parameter.dim() == 4]
    if not (images or weights):
        return []
    other = torch.channels_last if all(x.is_contiguous() for x in images) else torch.contiguous_format
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=other)
    inputs = tuple(x.contiguous(memory_format=other) if is_floating(x) and x.dim() == 4 else x for x in inputs)
    try:
        with _no_onednn():
            return [run(module, inputs, train, gradients=gradients)]
    except RuntimeError:  # some modules accept only one format, for example with .view() after a convolution
        return []


@contextlib.contextmanager
def _no_onednn():
    # and no NNPACK, which would take over for large batches and return contiguous images
    onednn = torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None)
    with onednn, torch.backends.nnpack.flags(enabled=False):
        yield


def _golden(reference):
    """Returns a copy in float64. The kernels don't support it, so modules that request them by name get "torch"."""
    golden = copy.deepcopy(reference).double()
    for module in golden.modules():
        if isinstance(module, (RiRLayer, ConvBNAct)):
            module.impl = "torch"
        elif is_fused(module) and not is_covered(module):
            swap_in(module, dataclasses.replace(module._rir_fusion, impl="torch"))
    return golden


def _amount(reference, inputs, given):
    """Returns the relative amount by which weights and inputs are moved, to see how gradients change within rounding.

    It is more than one rounding, so as not to miss any of the few elements whose mask may fall either way. In 16 bits
    there are many more of these, and the same number of roundings would leave nothing of the gradients.
    """
    tensors = [*reference.parameters(), *inputs, *given.tensors.values()]
    eps = max(torch.finfo(t.dtype).eps for t in tensors if is_floating(t))
    return (4 if eps > 2**-16 else 32) * eps


@torch.no_grad()
def _moved(golden, inputs, amount, seed):
    """Returns (golden, inputs) with every parameter and input moved by about +-`amount` of itself, at random."""
    seed_all(seed)
    golden = copy.deepcopy(golden)

    def move(x):
        return x * (1 + amount * torch.randn_like(x))

    for parameter in golden.parameters():
        parameter.copy_(move(parameter))
    return golden, tuple(move(x) if is_floating(x) else x for x in inputs)
