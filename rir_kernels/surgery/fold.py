"""fold_bn_: folds norms into the preceding convolutions, for inference."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..common.fused_class import class_of
from .activations import activation_of
from .bypass import act_of_norm, norm_obstacle
from .coverage import is_norm
from .folded_norm import FoldedNorm
from .fuse import check_model, walk
from .patterns import Refusal
from .recording import session
from .report import FusionReport, Replaced, Skipped
from .uses import Pair, Users


def fold_bn_(model: nn.Module, *, dry_run: bool = False) -> nn.Module | FusionReport:
    """Folds the batch norms of `model` into its convolutions, in place, for inference. Returns `model`.

    If a convolution's output goes only to its norm (grouped and dilated convolutions too), the convolution gets the
    norm's scale in its weight, and a bias; a `FoldedNorm` that does nothing replaces the norm. If an identity is added
    before the norm (conv_add_bn_act, the layers of Resnet in Resnet), the norm scales both per channel: it becomes an
    affine map, a FoldedNorm with weight and bias, applied in the kernel's epilogue. A norm that follows no convolution
    (bn_act) stays. fold_bn_ leaves unchanged what `fuse_` would refuse to bypass (hooks, parametrizations, subclasses),
    and chains that the model also uses otherwise: a second call of the convolution, another norm that forward may
    choose, a parameter that is shared or read. It traces every forward in `model` for such uses; an untraceable forward
    and a hook are judged by what they hold and the names in their code. So pass the whole model: uses outside it, and
    methods that no forward calls, are not seen. Attributes that forward's path depends on should not change afterwards:
    a flag that skips the norm has no effect on a folded one.

    The weight and bias of such a convolution are new Parameter objects: references to the old ones keep their values.
    Each chain is folded completely or not at all, even if an exception ends the call.

    Works on fused and unfused models; the latter may be fused afterwards. Folding cannot be undone: keep a copy
    (`unfuse_` raises). The weights are rounded to their dtype: fold in fp32, and cast afterwards.

    Args:
        dry_run: change nothing, and return a FusionReport: `replaced` lists what would be folded (conv_add_bn_act: a
            norm that becomes an affine map; conv_bn: all others, with the convolution), `skipped` every norm that stays
            and why. After folding it lists those that stayed.

    Raises, with nothing changed, ValueError for a model in training mode and TypeError if it is not an nn.Module.
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
    """Returns what is to be folded, each norm once, and fills in the report."""
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
                    found.setdefault(part, (module, one))  # an outer forward may already have found a convolution
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
    """Returns why no chain was found for the norm, from the innermost forward around it."""
    name = names[norm]
    around = [module for module in untraced if name.startswith(f"{names[module]}." if names[module] else "")]
    if not around:
        return norm_obstacle(norm) or "no convolution in front of the norm was found"
    return untraced[max(around, key=lambda module: len(names[module]))]


def _obstacle(norm, conv):
    """Returns why the norm cannot be folded into the convolution, or an empty string."""
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if conv is not None and any(type(p) not in (nn.Parameter, type(None)) for p in (conv.weight, conv.bias)):
        return "the convolution's weight or bias is no plain Parameter"
    return ""


def _apply(fold):
    """Computes everything before the first change; the changes only set dict entries, so that none can fail."""
    norm, conv = fold.norm, fold.conv
    wide = torch.float64
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    shift = shift if norm.bias is None else shift + norm.bias.to(wide)
    options = {"activation": activation_of(act_of_norm(norm)), "like": norm.running_mean}
    if conv is None:
        like = norm.running_mean.dtype
        folded = FoldedNorm(len(scale), scale.to(like), shift.to(like), **options)
    else:
        folded = FoldedNorm(len(scale), **options)
        weight, bias = conv.weight, conv.bias
        shift = shift if bias is None else shift + bias.to(wide) * scale
        folded_weight = weight.to(wide) * scale.view(-1, 1, 1, 1)
        # new objects: other references to the old ones keep their values
        conv._parameters.update(
            weight=_parameter(folded_weight, weight), bias=_parameter(shift, weight if bias is None else bias)
        )
    fold.owner._modules[fold.name.rpartition(".")[2]] = folded


def _parameter(value, like):
    return nn.Parameter(value.to(like.dtype), like.requires_grad)
