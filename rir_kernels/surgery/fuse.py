"""fuse_ and unfuse_: look first, then swap, so that a call that fails has changed nothing."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from torch import nn

from ..folded_norm import FoldedNorm
from ..preference import check_impl
from .classes import subclass_obstacle
from .patterns import PATTERNS, Match, Refusal, families
from .recording import Untraceable, session
from .report import FusionReport, Replaced, Skipped
from .swap import Recipe, changed_class, class_of, fused_class, is_covered, is_fused, swap_back, swap_in
from .tracer import first_line


def fuse_(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    patterns: Iterable[str] | None = None,
    impl: str = "auto",
    dry_run: bool = False,
) -> FusionReport:
    """Let conv, BN, (+ identity,) ReLU in a row run as one operation wherever `model` has them, in place.

    The forward of each module is traced once by torch.fx, its children black boxes. In its graph Conv2d, BatchNorm2d,
    ReLU is P1 and without the ReLU P2; P3 adds something behind the norm, P6 to a multiple of it, P4 before the norm;
    P5 is a norm and ReLU with no convolution in front. A child is looked into where a row crosses its border, if it is
    an nn.Sequential or of a class that is known (pytorchcv's blocks, `register_pattern`). Known as a whole are
    RiRLayer and ConvBNAct of rir_kernels.reference and pytorchcv's RiRUnit.

    Only the class of such a module changes, to a subclass of itself: submodules, parameter objects, state_dict keys,
    hooks on the module, mode, dtype and device stay, an optimizer made before goes on working, and deepcopy, pickle,
    torch.compile and functional_call do what they did. Everything is read from the submodules at each call. Where one
    that would be bypassed is no longer what it was (replaced, parametrized, a hook on it or on all modules, norms of
    one layer that disagree, its class patched), or an attribute that forward decided by, the modules are called as they
    were before; so they are where a call cannot be one operation, and raise what they raise.
    `unfuse_` is the way back. Meanwhile no other thread should run this model, or draw random numbers. What a forward
    changes besides its tensors (a list, an attribute, a global) is put back, and that module is left alone; what it
    prints is printed. Blocks of one class in which forward finds the same are traced once.

    Inputs, dtypes and shapes are those of the modules. Within autocast the fused operation returns autocast's dtype,
    also where an fp32 identity would have raised the sum to fp32. Activation checkpointing moves running statistics
    twice, as it does those of nn.BatchNorm2d; but where it stops its second forward early (use_reentrant=False), those
    of a norm that ends the region move once.

    Args:
        filter_fn: called as filter_fn(module, name); False leaves that module alone. One that is reached by several
            names is fused only if none of them is refused.
        patterns: of "P1" ... "P6", those to be fused; None is all.
        impl: see functional.conv_bn_act. One that cannot run is refused by the call, not here.
        dry_run: only report what would be done.

    Returns a FusionReport: what was replaced, and what looked like it but was left alone, with the reason.

    Raises ValueError for an unknown `impl` or pattern, TypeError for a model that is no nn.Module.
    """
    check_model(model)
    check_impl(impl)
    enabled = _check_patterns(patterns)
    report = FusionReport(model, dry_run=dry_run)
    swaps = []

    def fuse(module, family, names):
        """This one module; returns what is bypassed then."""
        kind, also = type(module).__name__, tuple(names[1:])
        try:
            found = family.find(module)
        except (Untraceable, Exception) as error:
            report.skipped.append(Skipped(names[0], _fault(error), kind, also))
            return set()
        matches, reasons = _select(module, family, found, enabled, filter_fn, names)
        report.skipped += [Skipped(names[0], reason, kind, also) for reason in reasons]
        if matches:
            try:
                recipe = Recipe(type(module), family.mixin, impl, enabled, family.program(module, matches))
            except (Untraceable, Exception) as error:
                report.skipped.append(Skipped(names[0], _fault(error), kind, also))
                return set()
            swaps.append((module, recipe))
        report.replaced += [Replaced(names[0], match.pattern, kind, impl, match.parts, also) for match in matches]
        done = [one for one in found if isinstance(one, Match)] if is_fused(module) else matches  # before, or now
        return {module.get_submodule(part) for one in done for part in (*one.parts, *one.inlined)}

    with session():
        walk(model, fuse)
    if not dry_run:
        for _, recipe in swaps:
            fused_class(recipe)  # all of them are there before any is swapped
        for module, recipe in swaps:
            swap_in(module, recipe)
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo fuse_: every module gets its class back, and nothing of the fusion remains. Returns `model`.

    RuntimeError, with nothing changed, where something else has swapped the class of a fused module since (FSDP's
    fully_shard, a parametrization): undo that first; and where fold_bn_ has been applied. TypeError for a model that
    is no nn.Module.
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
    """TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def walk(model, visit) -> None:
    """visit(module, family, all its names) once for every module of a family's kind, the outer ones first.

    It returns modules within that are not to be visited any more.
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
    """(the matches to be fused, the reasons of what is left alone)"""
    if found and (reason := _unit_obstacle(module, family)):
        return [], [reason]
    matches, reasons = [], []
    for one in found:
        if isinstance(one, Refusal):
            reasons.append(one.reason)
        elif one.pattern not in enabled:
            reasons.append(f"{one.pattern} is not among the patterns asked for")
        else:
            matches.append(one)
    if matches and filter_fn is not None and not all(filter_fn(module, name) for name in names):
        return [], [*reasons, "excluded by filter_fn"]
    return matches, reasons


def _unit_obstacle(module, family):
    if is_fused(module):
        program = module._rir_fusion.program
        changed = changed_class(module) or (program and program.obstacle(module))
        state = f", but runs its own forward, since {changed}" if changed else ""
        return f"already fused with impl={module._rir_fusion.impl!r}{state} (unfuse_ first to change it)"
    if reason := family.obstacle(type(module)) or subclass_obstacle(type(module)):
        return reason
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return ""


def _fault(error):
    """The reason why one module is skipped: whatever is odd about it, all others are fused."""
    if isinstance(error, Untraceable):
        return str(error)
    return f"it cannot be fused: {first_line(error)}"


def _check_patterns(patterns):
    if patterns is None:
        return PATTERNS
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    unknown = [name for name in patterns if name not in PATTERNS]
    if unknown:
        raise ValueError(f"patterns must be names out of {', '.join(PATTERNS)}, got {', '.join(map(repr, unknown))}")
    return tuple(sorted(set(patterns)))
