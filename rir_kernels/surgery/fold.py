"""fold_bn_: for inference, norms become part of the convolutions in front of them."""

from collections import Counter

import torch
from torch import nn

from ..folded_norm import FoldedNorm
from .fuse import check_model, walk
from .guards import norm_has_relu


def fold_bn_(model: nn.Module) -> nn.Module:
    """Fold the batch norms of `model` into its convolutions, in place, for inference. Returns `model`.

    Where a convolution's output goes to its norm alone (P1, P2, P3, P6; grouped and dilated ones too), the convolution
    gets the norm's scale in its weight, and a bias; the norm's place is taken by a `FoldedNorm` that does nothing.
    Where an identity joins before the norm (P4, the layers of Resnet in Resnet) both are scaled per channel: the norm
    becomes the affine map that it is, a FoldedNorm with weight and bias, applied in the kernel's epilogue. A norm with
    no convolution in front (P5) stays. What `fuse_` would refuse to bypass (hooks, parametrizations, subclasses) and
    weights that several modules share are left alone.

    Works on a fused model and on one that is not, which may be fused afterwards. There is no way back: keep a copy
    (`unfuse_` raises). The weights are rounded to their dtype: fold in fp32, and cast afterwards.

    Raises, with nothing changed: ValueError for a model in training mode, TypeError for one that is no nn.Module.
    """
    check_model(model)
    folds = _folds(model)
    for name, _, norm in folds:
        if norm.training:
            raise ValueError(f"{name} is in training mode, where it has no statistics to fold: call model.eval() first")
    with torch.no_grad():
        for name, conv, norm in folds:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _fold(conv, norm))
    return model


def _folds(model):
    """(name of the norm, conv or None, norm), each norm once."""
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    found = {}

    def visit(module, family, module_names):
        for fold in family.folds(module):
            norm, conv = module.get_submodule(fold.norm), fold.conv and module.get_submodule(fold.conv)
            tied = names[id(norm)] > 1 or (conv is not None and (names[id(conv)] > 1 or uses[id(conv.weight)] > 1))
            known = norm.running_mean is not None and norm.running_var is not None
            if known and not tied and type(norm) is not FoldedNorm:
                found[id(norm)] = ".".join(filter(None, (module_names[0], fold.norm))), conv, norm
        return ()

    walk(model, visit)
    return list(found.values())


def _fold(conv, norm):
    """What takes the norm's place."""
    wide = torch.float64
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    shift = shift if norm.bias is None else shift + norm.bias.to(wide)
    options = {"relu": norm_has_relu(norm), "like": norm.running_mean}
    if conv is None:
        like = norm.running_mean.dtype
        return FoldedNorm(len(scale), scale.to(like), shift.to(like), **options)
    weight = conv.weight
    if conv.bias is not None:
        shift = shift + conv.bias.to(wide) * scale
        conv.bias.copy_(shift)
    else:
        conv.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    weight.copy_(weight.to(wide) * scale.view(-1, 1, 1, 1))
    return FoldedNorm(len(scale), **options)
