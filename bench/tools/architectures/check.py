"""One network, fused: what was done to it, and how far its numbers are from the unfused network's."""

import copy
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import rir_kernels as rir

# fp64 rounds at 1e-16; a hundred layers and divisions by small deviations make 1e-12 of it, a mistake 1e-3
TOLERANCE = 1e-9
BATCH = 2
GROUPS = ("output", "input gradient", "parameter gradients", "statistics")


@dataclass
class Record:
    """What is known of one network after `check`; `defects` says what should not be so."""

    id: str
    replaced: dict[str, int] = field(default_factory=dict)  # by code of the pattern
    skipped: dict[str, int] = field(default_factory=dict)  # by class and reason
    report_lines: int = 0
    fused_calls: dict[str, int] = field(default_factory=dict)  # by mode, in one forward
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # by mode and group, relative
    seconds: float = 0.0  # of fuse_
    defects: list[str] = field(default_factory=list)


def check(architecture, *, dtype=torch.float64) -> Record | None:
    """None where the library does not import."""
    seed()
    original = architecture.make()
    if original is None:
        return None
    original = settled(original.to(dtype), architecture.size)
    record = Record(architecture.id)
    fused = copy.deepcopy(original)
    identities = _identities(fused)
    state = copy.deepcopy(fused.state_dict())

    start = time.perf_counter()
    report = rir.fuse_(fused)
    record.seconds = time.perf_counter() - start
    record.replaced = dict(sorted(Counter(item.code for item in report.replaced).items()))
    # one cause once: what stands within a module that has an entry for it is left out
    left = [item for item in report.skipped if item.within is None]
    record.skipped = dict(Counter(f"{item.kind}: {item.reason}" for item in left).most_common())
    record.report_lines = len(str(report).splitlines())
    missed = [pattern for pattern in architecture.needs if pattern not in record.replaced]
    _blame(record, missed, f"missed {', '.join(missed)}")
    _blame(record, architecture.untouched and report.replaced, "there was nothing to fuse")
    _blame(record, _identities(fused) != identities, "modules, parameters or buffers are other objects")
    _blame(record, not same_bits(state, fused.state_dict()), "fuse_ changed the state_dict")

    for mode in ("train", "eval"):
        x = image(architecture.size, dtype)
        expected = step(original, x, mode)
        with rir.record_calls() as calls:
            found = step(fused, x, mode)
        record.fused_calls[mode] = sum(call.fused for call in calls)
        record.errors[mode] = {group: difference(found[group], expected[group]) for group in GROUPS}
        for group, error in record.errors[mode].items():
            _blame(record, not error <= TOLERANCE, f"{mode}: {group} differs by {error:.1e}")
    idle = len(report.replaced) - record.fused_calls["train"]
    _blame(record, idle > architecture.idle, f"{idle} operations never run, {architecture.idle} are known not to")
    _restored(record, fused, original, x, identities)
    return record


def _restored(record, fused, original, x, identities):
    rir.unfuse_(fused)
    fused.load_state_dict(original.state_dict())  # the statistics of the steps have rounded differently
    kinds = [[type(module) for module in model.modules()] for model in (fused, original)]
    _blame(record, kinds[0] != kinds[1], "unfuse_ left other classes")
    _blame(record, _identities(fused) != identities, "unfuse_ left other objects")
    found, expected = step(fused, x, "train"), step(original, x, "train")
    _blame(
        record, not all(same_bits(found[group], expected[group]) for group in GROUPS), "after unfuse_ the bits differ"
    )
    _blame(record, not same_bits(fused.state_dict(), original.state_dict()), "after unfuse_ the state_dict differs")


def seed():
    """All generators that a network may draw from."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def settled(model: nn.Module, size: int) -> nn.Module:
    """With norms that differ, and with statistics that belong to them: no value vanishes or explodes on the way."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            if norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(std=0.2)
        parameter = next(model.parameters())
        model.train()(image(size, parameter.dtype))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.running_var is not None:
                norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
                norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5)
    return model


def image(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Images of noise, always the same."""
    return torch.randn(BATCH, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor, mode: str) -> dict[str, dict[str, torch.Tensor]]:
    """One forward and backward pass: tensors by name, in the GROUPS."""
    model.train(mode == "train").zero_grad()
    x = x.clone().requires_grad_()
    seed()
    y = model(x)
    outputs = [leaf for leaf in tree_leaves(dict(y) if hasattr(y, "items") else y) if isinstance(leaf, torch.Tensor)]
    generator = torch.Generator().manual_seed(2)
    sum((out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() for out in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "output": {str(i): out.detach() for i, out in enumerate(outputs)},
        "input gradient": {"x": x.grad},
        "parameter gradients": gradients,
        "statistics": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest error of any tensor, relative to its own largest value.

    But at least to a thousandth of the largest of all: some gradients (of a bias ahead of a norm) are zero but for
    rounding.
    """
    if found.keys() != expected.keys():
        return float("nan")
    largest = {name: _largest(tensor) for name, tensor in expected.items()}
    floor = 1e-3 * max(largest.values(), default=0.0)
    worst = 0.0
    for name, tensor in expected.items():
        error = _largest(found[name].double() - tensor.double())
        if error:
            worst = max(worst, error / max(largest[name], floor)) if error == error else float("nan")
        if worst != worst:
            break
    return worst


def _largest(tensor):
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Of two dicts of tensors."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _identities(model):
    parts = (model.named_modules(), model.named_parameters(), model.named_buffers())
    return [(name, id(part)) for named in parts for name, part in named]


def _blame(record, wrong, defect):
    if wrong:
        record.defects.append(defect)
