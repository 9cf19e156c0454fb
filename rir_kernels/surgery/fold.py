"""fold_bn_: for inference, norms become part of the convolutions in front of them."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..common.fused_class import class_of
from .coverage import is_norm
from .folded_norm import FoldedNorm
from .fuse import check_model, walk
from .guards import norm_has_relu, norm_obstacle
from .patterns import Refusal
from .recording import session
from .report import FusionReport, Replaced, Skipped
from .uses import Pair, Users


def fold_bn_(model: nn.Module, *, dry_run: bool = False) -> nn.Module | FusionReport:
    """Fold the batch norms of `model` into its convolutions, in place, for inference. Returns `model`.

    Where a convolution's output goes only to its norm (grouped and dilated convolutions too), the convolution gets the
    norm's scale in its weight, and a bias; the norm's place is taken by a `FoldedNorm` that does nothing. Where an
    identity joins before the norm (conv_add_bn_act, the layers of Resnet in Resnet) both are scaled per channel: the
    norm becomes the affine map that it is, a FoldedNorm with weight and bias, applied in the kernel's epilogue. A norm
    with no convolution in front (bn_act) stays. What `fuse_` would refuse to bypass (hooks, parametrizations,
    subclasses) is left unchanged, and so is a chain of which the model makes another use: a second call of the
    convolution, another norm that forward may choose, a parameter that is shared or read. Every forward in `model` is
    traced for such uses; one that cannot be traced, and a hook, are judged by what they hold and the names in their
    code. So pass the whole model: uses outside it, and methods that no forward calls, are not seen. An attribute that
    forward decides by should not change afterwards: a flag that skips the norm has no effect on a folded one.

    The weight and bias of such a convolution are new Parameter objects: what refers to the old ones keeps their values.
    Each chain is folded as a whole or not at all, also where an exception ends the call.

    Works on a fused model and on one that is not, which may be fused afterwards. There is no way back: keep a copy
    (`unfuse_` raises). The weights are rounded to their dtype: fold in fp32, and cast afterwards.

    Args:
        dry_run: change nothing, and return a FusionReport: as `replaced` what would be folded (conv_add_bn_act: a norm
            that becomes an affine map; conv_bn: all others, with the convolution), as `skipped` every norm that stays
            and why. After folding it lists those that stayed.

    Raises, with nothing changed: ValueError for a model in training mode, TypeError for one that is no nn.Module.
    """
    check_model(model)
    report = FusionReport(model, dry_run=True, verb="fold")
    with session():
        folds = _folds(model, report)
    if dry_run:
        return report
    for fold in folds:
        if fold.norm.training:
            raise ValueError(
                f"{fold.name} is in training mode, where it has no statistics to fold: call model.eval() first"
            )
    with torch.no_grad():
        for fold in folds:
            _apply(fold)
    return model


class _Fold(NamedTuple):
    name: str  # the norm's
    owner: nn.Module  # of the norm
    norm: nn.Module
    conv: nn.Module | None


def _folds(model, report):
    """What is to be folded, each norm once; everything is written into the report."""
    found: dict[nn.Module, tuple] = {}  # by norm
    untraced: dict[nn.Module, str] = {}

    def visit(module, family, names):
        for one in family.folds(module):
            if not isinstance(one, Refusal):
                found[module.get_submodule(one.norm)] = module, one
                continue
            untraced.setdefault(module, one.reason)
            for part in map(module.get_submodule, one.parts):
                if isinstance(part, _NormBase):
                    found.setdefault(part, (module, one))  # the forward around it may have seen a convolution
        return ()

    walk(model, visit)
    folds, users = [], Users(model)
    for norm, name in users.names.items():
        if not (isinstance(norm, _NormBase) or is_norm(norm)):
            continue
        module, one = found.get(norm, (None, None))
        if one is None:
            reason = _why_not_found(norm, users.names, untraced)
        elif isinstance(one, Refusal):
            reason = one.reason
        else:
            conv = one.conv and module.get_submodule(one.conv)
            forwards = (module, *map(module.get_submodule, one.inlined))
            reason = _obstacle(norm, conv) or users.other_use(Pair(norm, conv, forwards, one.traces))
        if reason:
            report.skipped.append(Skipped(name, reason, type(norm).__name__))
            continue
        parts = (one.norm,) if conv is None else (one.conv, one.norm)
        pattern = "conv_add_bn_act" if conv is None else "conv_bn"
        report.replaced.append(Replaced(users.names[module], pattern, class_of(module).__name__, "", parts))
        folds.append(_Fold(name, model.get_submodule(name.rpartition(".")[0]), norm, conv))
    return folds


def _why_not_found(norm, names, untraced):
    """Why no chain was found for the norm: the innermost forward around it says so."""
    name = names[norm]
    around = [module for module in untraced if name.startswith(f"{names[module]}." if names[module] else "")]
    if not around:
        return norm_obstacle(norm) or "no convolution in front of the norm was found"
    return untraced[max(around, key=lambda module: len(names[module]))]


def _obstacle(norm, conv):
    """What folding needs of the two."""
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if conv is not None and any(type(p) not in (nn.Parameter, type(None)) for p in (conv.weight, conv.bias)):
        return "the convolution's weight or bias is no plain Parameter"
    return ""


def _apply(fold):
    """All is computed before the first change, and what changes are entries of dicts, so that none can fail."""
    norm, conv = fold.norm, fold.conv
    wide = torch.float64
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    shift = shift if norm.bias is None else shift + norm.bias.to(wide)
    options = {"relu": norm_has_relu(norm), "like": norm.running_mean}
    if conv is None:
        like = norm.running_mean.dtype
        folded = FoldedNorm(len(scale), scale.to(like), shift.to(like), **options)
    else:
        folded = FoldedNorm(len(scale), **options)
        weight, bias = conv.weight, conv.bias
        shift = shift if bias is None else shift + bias.to(wide) * scale
        folded_weight = weight.to(wide) * scale.view(-1, 1, 1, 1)
        # other objects: whatever else refers to the old ones keeps their values
        conv._parameters.update(
            weight=_parameter(folded_weight, weight), bias=_parameter(shift, weight if bias is None else bias)
        )
    fold.owner._modules[fold.name.rpartition(".")[2]] = folded


def _parameter(value, like):
    return nn.Parameter(value.to(like.dtype), like.requires_grad)
