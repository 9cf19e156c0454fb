"""The criterion by which `compare` judges a tensor.

The golden is the reference itself in float64 on the same rounded inputs, and

    max|candidate - golden|  <=  2 * E  +  2 * eps(dtype) * max|golden|

where E is the reference's own error in its dtype, the larger of two runs: the inputs as given, and in the other memory
format. One run is not enough: in the other format torch sums in another order and precision, the two errors differ by
up to 20 times, and both are equally right.

**Kinks.** A gradient is not continuous. If the input of a ReLU is within rounding of zero, its mask may fall either
way, and every gradient that depends on it jumps: in fp32 by a thousand times the rounding. A deep network has a handful
of such elements, and it is chance whether one falls differently in the reference's runs or in the candidate's. So if a
gradient misses its budget, E also includes how far the *exact* gradients move when every weight and input moves by a
few roundings: a result that is exact for data within rounding of the given data is right. This lets flipped masks and
other ill-conditioned results pass, and no more. Outputs and statistics are continuous and never need it.

**Blind rows.** In 16-bit types masks flip by the thousand, and in a deep network PyTorch's own gradients have large
errors. Such rows pass but prove little, and say so. Smaller pieces, or float32, show more.

**Gradients that are zero in exact arithmetic** (a bias before a batch norm in training) have no magnitude. What remains
is the rounding of sums that cancel, judged at the scale of the same module's other gradients. A running mean is judged
in the same way, at the scale of the running standard deviation.
"""

import dataclasses
import math

import torch

from .report import EquivalenceRow

KINDS = ("output", "input grad", "param grad", "buffer")
GRADIENTS = ("input grad", "param grad")
GOLDEN_EPS = 2**-44  # the golden's own rounding through a deep network: matters only for float64
ZERO = 2**-36  # a golden gradient below this part of its siblings is zero in exact arithmetic
ZERO_ROUNDINGS = 16  # its allowed magnitude, at its siblings' scale
BLIND = 0.1
NOT_COMPARED = "; gradients were not compared"


def judge_all(given, exact, result, moved=()) -> list[EquivalenceRow]:
    """Returns a row for every tensor of the reference's runs `given` and of the candidate's run `result`.

    A run has `tensors`, by (kind, name), and the outputs' `structure`. `exact` is the golden, `moved` are goldens on
    data within rounding of the given data, for gradients that fail otherwise.
    """
    expected, got = given[0].tensors, result.tensors
    unlike = {key: why for key in expected | got if (why := _unlike(key, expected, got))}
    if given[0].structure != result.structure:
        unlike["output", "structure"] = " ".join(f"expected {given[0].structure}, got {result.structure}".split())
    comparable = KINDS
    if any(kind == "output" for kind, _ in unlike):
        comparable = ("output", "buffer")  # gradients of unlike outputs have unlike cotangents
        unlike = {key: why + NOT_COMPARED if key[0] == "output" else why for key, why in unlike.items()}

    magnitudes = {key: _magnitude(golden) for key, golden in exact.tensors.items() if is_floating(golden)}
    rows = [_not_judged(key, expected.get(key, got.get(key)), why) for key, why in unlike.items()]
    for key in expected:
        if key in unlike or key[0] not in comparable:
            continue
        if not is_floating(expected[key]):
            rows.append(_judge_equal(key, expected[key], got[key]))
            continue
        scale = _scale(key, magnitudes)
        row = judge(key, got[key], exact.tensors[key], [run.tensors[key] for run in given], *scale)
        if moved and key[0] in GRADIENTS and not row.passed:
            plain = row.budget
            row = judge(key, got[key], exact.tensors[key], [run.tensors[key] for run in (*given, *moved)], *scale)
            if row.passed:
                note = f"kink: over {plain:.1e}, but rounding of the data moves the exact gradient as far"
                row = dataclasses.replace(row, note=f"{note}; {row.note}".removesuffix("; "))
        rows.append(row)
    return sorted(rows, key=lambda row: KINDS.index(row.kind))


def is_floating(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _unlike(key, expected, got) -> str:
    """Returns why the two cannot be compared, or an empty string."""
    if key not in got or key not in expected:
        return f"only in the {'reference' if key in expected else 'candidate'}"
    expected, got = expected[key], got[key]
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        return "" if type(expected) is type(got) else f"expected {type(expected).__name__}, got {type(got).__name__}"
    if expected.shape != got.shape:
        return f"expected the shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    return "" if expected.dtype == got.dtype else f"expected {expected.dtype}, got {got.dtype}"


def _not_judged(key: tuple[str, str], value, note):
    return EquivalenceRow(*key, *_shape_and_dtype(value), None, None, None, None, None, False, note)


def _judge_equal(key: tuple[str, str], expected, got):
    """Judges integers, booleans and non-tensors, which must be equal."""
    if not isinstance(expected, torch.Tensor):
        equal, note = expected == got, f"expected {expected!r}, got {got!r}"
        return EquivalenceRow(
            *key, *_shape_and_dtype(expected), None, None, None, None, None, equal, note * (not equal)
        )
    errors = (got.double() - expected.double()).abs()
    largest = _largest(errors)
    return EquivalenceRow(
        *key, *_shape_and_dtype(expected), largest, _rms(errors), 0.0, 0.0, _worst_channel(key[0], errors),
        largest == 0.0, "" if largest == 0.0 else "must be equal",
    )  # fmt: skip


def judge(key: tuple[str, str], got, golden, runs, scale, roundings=2, note="") -> EquivalenceRow:
    """Returns the row of one floating tensor; runs: the reference's results, scale: what rounding is relative to."""
    errors = _errors(got, golden)
    error = _largest(errors)
    reference_error = max(_largest(_errors(run, golden)) for run in runs)
    if not golden.any() and reference_error == 0.0:
        scale = 0.0  # zero not by cancellation, but because there is no gradient
    budget = 2 * reference_error + (roundings * torch.finfo(got.dtype).eps + GOLDEN_EPS) * scale

    passed = error <= budget
    if math.isinf(reference_error):
        passed, note = False, "the reference is not finite where the golden is: scale the inputs"
    elif math.isinf(error):
        note = "not finite where the golden is, or the reverse"
    elif reference_error > BLIND * scale > 0.0 and not note:
        note = f"blind: rounding alone moves it by {reference_error / scale:.0%}"
    return EquivalenceRow(
        *key, *_shape_and_dtype(got), error, _rms(errors), reference_error, budget, _worst_channel(key[0], errors),
        passed, note,
    )  # fmt: skip


def _scale(key, magnitudes):
    """Returns (the magnitude that rounding is relative to, the number of roundings allowed, a note)."""
    kind, name = key
    own = magnitudes[key]
    owner, _, leaf = name.rpartition(".")
    if kind == "buffer" and leaf == "running_mean":
        return max(own, math.sqrt(magnitudes.get((kind, name.removesuffix("mean") + "var"), 0.0))), 2, ""
    if kind == "param grad":
        siblings = [value for (k, n), value in magnitudes.items() if k == kind and n.rpartition(".")[0] == owner]
        scale = max(siblings)
        if own <= ZERO * scale:
            return scale, ZERO_ROUNDINGS, "zero but for rounding"
    return own, 2, ""


def _errors(value, golden):
    """Returns |value - golden|; 0 where both are the same infinity or both NaN, inf where only one is not finite."""
    value = value.double()
    same = (value == golden) | (value.isnan() & golden.isnan())
    return (value - golden).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def _magnitude(x):
    return _largest(x.abs().masked_fill(~x.isfinite(), 0.0))


def _largest(x):
    return x.max().item() if x.numel() else 0.0


def _rms(errors):
    return errors.square().mean().sqrt().item() if errors.numel() else 0.0


def _worst_channel(kind, errors):
    dim = 1 if kind in ("output", "input grad") else 0
    if errors.dim() <= dim or _largest(errors) == 0.0:
        return None
    return errors.transpose(0, dim).flatten(1).amax(1).argmax().item() if errors.dim() > 1 else errors.argmax().item()


def _shape_and_dtype(value) -> tuple[tuple[int, ...] | None, str]:
    if not isinstance(value, torch.Tensor):
        return None, type(value).__name__
    return tuple(value.shape), str(value.dtype).removeprefix("torch.")
