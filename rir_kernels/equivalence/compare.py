"""compare: is one module the same function as another, in its values, its gradients and its running statistics?

This module runs the modules; `criterion` explains how the results are judged, and why.
"""

import copy
import dataclasses

import torch
from torch import nn

from ..common.inputs import as_inputs
from ..common.random_state import undisturbed
from .report import EquivalenceReport
from .runs import named, run
from .yardstick import Yardstick


def compare(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: torch.Tensor | tuple[torch.Tensor | None, ...],
    *,
    train: bool = True,
) -> EquivalenceReport:
    """Compares outputs, input gradients, parameter gradients and buffers of `candidate` with those of `reference`.

    Args:
        reference: any module; its fp64 copy is the golden.
        candidate: a module with the same weights under the same names; RiRLayers, on either side, count as what their
            to_reference() returns.
        inputs: what forward takes, a tensor or a tuple, of any dtype and shape. Floating inputs get gradients.
        train: compare in training mode, where running statistics move, or in eval mode, where they must not.

    Works on copies: modules, gradients, buffers, inputs, training flags and torch's random state stay unchanged. Each
    run starts from the same seed, its backward from the same random cotangent. Outputs may be any pytree of tensors;
    integers, booleans and non-tensors in it must be equal.

    A name that only one side has fails the report, and so do unlike structures, shapes and dtypes. A missing gradient
    counts as zeros: if the reference has none (a frozen or unused parameter), the candidate must have none, or zeros.

    Returns a report that is true if every row passed; print it, or let a notebook display it. The docstring of
    `rir_kernels.equivalence.criterion` explains how rows are judged, and why.

    Raises TypeError if an argument or an output has another type, RuntimeError if the modules are on different devices,
    and what the modules themselves raise.
    """
    inputs = _check(reference, candidate, inputs)
    with undisturbed():
        yardstick = Yardstick(reference, inputs, train)
        result = run(candidate, inputs, train)
        rows = yardstick.judge(result)
        before = named(copy.deepcopy(reference)), named(copy.deepcopy(candidate))
    if not train:
        rows = [_check_unmoved(row, before, (yardstick.given[0].tensors, result.tensors)) for row in rows]
    return EquivalenceReport(tuple(_explain(row, *before) for row in rows), train)


def _check(reference, candidate, inputs):
    for name, module in (("reference", reference), ("candidate", candidate)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    devices = [sorted({str(t.device) for t in (*m.parameters(), *m.buffers())}) for m in (reference, candidate)]
    if all(devices) and devices[0] != devices[1]:
        raise RuntimeError(
            f"reference and candidate must be on the same device, got {devices[0]} and {devices[1]}: "
            "move one with .to(device)"
        )
    return as_inputs("inputs", inputs)


def _check_unmoved(row, before, after):
    """Checks that in eval mode the candidate leaves every buffer unchanged that the reference leaves unchanged."""
    key = (row.kind, row.name)
    if row.kind != "buffer" or not row.passed or key not in before[0]:
        return row
    (reference, candidate), (reference_after, candidate_after) = (
        [state[key] for state in pair] for pair in (before, after)
    )
    if torch.equal(candidate, candidate_after) or not torch.equal(reference, reference_after):
        return row
    return dataclasses.replace(row, passed=False, note="changed in eval mode")


def _explain(row, reference, candidate):
    """Adds a note to a failed row if its tensor already differed before the run, which is the commonest reason."""
    ours, theirs = (state.get((row.kind, row.name)) for state in (candidate, reference))
    if row.passed or ours is None or theirs is None or ours.shape != theirs.shape or torch.equal(ours, theirs.to(ours)):
        return row
    what = "weights" if row.kind == "param grad" else "values"
    return dataclasses.replace(row, note=f"the {what} differed before the run; {row.note}".removesuffix("; "))
