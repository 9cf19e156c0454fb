"""fuse_ and unfuse_: find everything first, then swap classes, so that a failing call changes nothing."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..common.fused_class import class_of
from ..common.inputs import as_inputs
from ..dispatch.preference import check_impl
from .class_swap import Recipe, changed_class, fused_class, is_covered, is_fused, swap_back, swap_in
from .classes import subclass_obstacle
from .coverage import Ledger
from .folded_norm import FoldedNorm
from .macs import macs_share
from .pattern_names import PATTERNS, pattern_name
from .patterns import Match, Refusal, families
from .recording import Untraceable, session
from .report import FusionReport, Replaced, Skipped
from .tracer import first_line


def fuse_(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    patterns: Iterable[str] | None = None,
    impl: str = "auto",
    dry_run: bool = False,
    example_inputs: torch.Tensor | tuple[torch.Tensor | None, ...] | None = None,
) -> FusionReport:
    """Fuses chains of conv, BN, (+ identity,) ReLU in `model` into single operations, in place.

    torch.fx traces the forward of each module once, with opaque children. In its graph Conv2d, BatchNorm2d, ReLU is
    "conv_bn_act", without the ReLU "conv_bn"; "conv_bn_add_act" adds something after the norm,
    "conv_bn_scaled_add_act" to a multiple of it, "conv_add_bn_act" before the norm; "bn_act" has no convolution. A
    child is inlined if a chain crosses its boundary and it is an nn.Sequential or of a registered class (pytorchcv's
    blocks, `register_pattern`). RiRLayer and ConvBNAct of rir_kernels.reference and pytorchcv's RiRUnit are known as a
    whole.

    Only the class of such a module changes, to a subclass of itself: submodules, parameter objects, state_dict keys,
    hooks on the module, mode, dtype and device stay, an existing optimizer keeps working, and deepcopy, pickle,
    torch.compile and functional_call work as before. Each call reads everything from the submodules. If a bypassed one
    has changed (replaced, parametrized, a hook on it or on all modules, norms of one layer that disagree, its class
    patched), or an attribute that forward's path depends on, the modules are called as before fusing. The same happens
    if a call cannot be one operation; the modules then raise their own errors.
    `unfuse_` reverts this. During fuse_, no other thread should run this model or draw random numbers. If a forward
    changes anything other than its tensors (a list, an attribute, a global), fuse_ restores it and leaves that module
    alone; output that it prints appears. Blocks of one class in which forward reads the same values are traced once.

    Inputs, dtypes and shapes are those of the modules. Under autocast the fused operation returns autocast's dtype,
    even if an fp32 identity would have promoted the sum to fp32. Activation checkpointing updates running statistics
    twice, as it does those of nn.BatchNorm2d; but if it stops its second forward early (use_reentrant=False), those of
    a norm that ends the region are updated once.

    Args:
        filter_fn: called as filter_fn(module, name); False leaves that module alone. A module with several names is
            fused only if filter_fn rejects none of them.
        patterns: the names of those to be fused, or "P1" ... "P6"; None is all.
        impl: see functional.conv_bn_act. If it cannot run, the call raises, not fuse_.
        dry_run: only report what would be done.
        example_inputs: what forward takes, a tensor or a tuple, for report.coverage.macs_share: a copy of the model
            runs with them once, in evaluation, without gradients and hooks. Model, inputs and random state stay.

    Returns a FusionReport: what was replaced; every convolution and norm that is in no fused operation, and every
    module that might have had one, with the reason; and how much of the model is covered.

    Raises ValueError for an unknown `impl` or pattern, TypeError if the model is not an nn.Module or example_inputs are
    not tensors, and what the model raises for these; then nothing has been changed.
    """
    check_model(model)
    check_impl(impl)
    enabled = _check_patterns(patterns)
    inputs = None if example_inputs is None else as_inputs("example_inputs", example_inputs)
    report, ledger = FusionReport(model, dry_run=dry_run), Ledger(model)
    swaps = []

    def fuse(module, family, names):
        """Fuses this module; returns the modules that it then bypasses."""
        kind, also = class_of(module).__name__, tuple(names[1:])

        def skip(refusals):
            for one in refusals:
                report.skipped.append(Skipped(names[0], one.reason, kind, also))
                ledger.refuse(module, one)

        for one in family.runs(module):
            ledger.fuse(module, one.parts)
            ledger.own.add(module)
        try:
            found = family.find(module)
        except (Untraceable, Exception) as error:
            skip([Refusal(_fault(error))])
            return set()
        if found and is_fused(module):
            report.skipped.append(Skipped(names[0], _fused_before(module, found, ledger), kind, also))
            done = [one for one in found if isinstance(one, Match)]
        else:
            done, refusals = _select(module, family, found, enabled, filter_fn, names)
            skip(refusals)
            if done:
                try:
                    recipe = Recipe(type(module), family.mixin, impl, enabled, family.program(module, done))
                except (Untraceable, Exception) as error:
                    skip([Refusal(_fault(error))])
                    return set()
                swaps.append((module, recipe))
            for match in done:
                report.replaced.append(Replaced(names[0], match.pattern, kind, impl, match.parts, also))
                ledger.fuse(module, match.parts)
        return {module.get_submodule(part) for one in done for part in (*one.parts, *one.inlined)}

    with session():
        walk(model, fuse)
    report.skipped += ledger.skipped({item.name for item in report.skipped})
    report.coverage = ledger.coverage(None if inputs is None else macs_share(model, ledger, inputs))
    if not dry_run:
        for _, recipe in swaps:
            fused_class(recipe)  # create all classes before any is swapped
        for module, recipe in swaps:
            swap_in(module, recipe)
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Undoes fuse_: every module gets its class back, and nothing of the fusion remains. Returns `model`.

    Raises RuntimeError, with nothing changed, if something else has since swapped the class of a fused module (FSDP's
    fully_shard, a parametrization; undo that first), or if fold_bn_ has been applied. Raises TypeError if the model is
    not an nn.Module.
    """
    check_model(model)
    if any(isinstance(module, FoldedNorm) for module in model.modules()):
        raise RuntimeError("fold_bn_ has folded norms of the model into its weights: there is no way back, use a copy")
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    for name, module in fused:
        if is_covered(module):
            raise RuntimeError(
                f"{name or 'the model'} was fused, and is now a {type(module).__name__}, a class that something else "
                "put on top: undo that first, or unfuse_ before it is applied"
            )
    for _, module in fused:
        swap_back(module)
    return model


def check_model(model) -> None:
    """Raises TypeError unless the model is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def walk(model, visit) -> None:
    """Calls visit(module, family, all its names) once for every module of a family's kind, outer ones first.

    `visit` returns the modules within that should not be visited any more.
    """
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    seen, bypassed = set(), set()

    def walk(module):
        if module is None or module in seen:
            return
        seen.add(module)
        family = next((family for family in families() if family.knows(class_of(module))), None)
        if family is not None and module not in bypassed:
            bypassed.update(visit(module, family, names[id(module)]))
        for child in module._modules.values():
            walk(child)

    walk(model)


def _select(module, family, found, enabled, filter_fn, names):
    """Returns (the matches to be fused, refusals of what is left alone)."""
    if found and (reason := _unit_obstacle(module, family)):
        return [], [Refusal(reason)]
    matches, refusals = _sorted_out(found, enabled)
    if matches and filter_fn is not None and not all(filter_fn(module, name) for name in names):
        parts = tuple(part for match in matches for part in match.parts)
        return [], [*refusals, Refusal("excluded by filter_fn", parts)]
    return matches, refusals


def _sorted_out(found, enabled):
    """Returns (the matches of these patterns, refusals of the rest)."""
    matches, refusals = [], []
    for one in found:
        if isinstance(one, Refusal):
            refusals.append(one)
        elif one.pattern not in enabled:
            refusals.append(Refusal(f"{one.pattern} is not among the patterns asked for", one.parts))
        else:
            matches.append(one)
    return matches, refusals


def _unit_obstacle(module: nn.Module, family):
    if reason := family.obstacle(type(module)) or subclass_obstacle(type(module)):  # type: ignore[arg-type] # a class is hashable
        return reason
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return ""


def _fused_before(module, found, ledger):
    """Returns why a fused module is skipped, and records in the ledger which of the operations found now it runs."""
    recipe = module._rir_fusion
    changed = changed_class(module) or (recipe.program.obstacle(module) if recipe.program else "")
    state = f", but runs its own forward, since {changed}" if changed else ""
    reason = f"already fused with impl={recipe.impl!r}{state} (unfuse_ first to change it)"
    if changed:
        ledger.refuse(module, Refusal(reason))
        return reason
    matches, refusals = _sorted_out(found, recipe.patterns)
    for match in matches:
        ledger.fuse(module, match.parts)
    for refusal in refusals:
        if refusal.parts:
            ledger.refuse(module, refusal)
    return reason


def _fault(error):
    """Returns the reason to skip one module after an error, so that all others are still fused."""
    if isinstance(error, Untraceable):
        return str(error)
    return f"it cannot be fused: {first_line(error)}"


def _check_patterns(patterns):
    if patterns is None:
        return PATTERNS
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple(sorted(set(map(pattern_name, patterns))))
