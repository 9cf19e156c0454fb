"""nn.Sequential: every Conv2d, BatchNorm2d, ReLU in a row is P1, and Conv2d, BatchNorm2d is P2.

The children are gone through again at every call, so replaced, added and removed ones are as good as those that were
there when fusing.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ... import norm_state
from ...spec import ConvBNActSpec
from ..guards import bypass_obstacle, call_obstacle, padding_of, pair
from ..swap import Fused
from .base import Family, Match, Refusal

_PATTERN = {2: "P2", 3: "P1"}  # by the number of modules


class FusedSequential(Fused):
    def forward(self, input):
        modules = list(self._modules.values())
        for start, stop in _spans(modules):
            span = modules[start:stop]
            pattern = _PATTERN.get(len(span))
            if pattern in self._rir_fusion.patterns and not (call_obstacle(input) or _obstacle(*span)):
                input = _run(input, *span, impl=self._rir_fusion.impl)
            else:
                for module in span:
                    input = module(input)
        return input


def _find(sequential):
    names, modules = list(sequential._modules), list(sequential._modules.values())
    found = []
    for start, stop in _spans(modules):
        parts = tuple(names[start:stop])
        if len(parts) > 1:
            reason = _obstacle(*modules[start:stop])
            found.append(Refusal(reason, parts) if reason else Match(_PATTERN[len(parts)], parts))
    return found


def _spans(modules):
    """(start, stop) of what comes one after the other: single modules, and what looks like P1 or P2."""
    spans, start = [], 0
    while start < len(modules):
        stop = start + 1
        if isinstance(modules[start], (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(_at(modules, stop), _BatchNorm):
            stop += 2 if isinstance(_at(modules, stop + 1), nn.ReLU) else 1
        spans.append((start, stop))
        start = stop
    return spans


def _at(modules, index):
    return modules[index] if index < len(modules) else None


def _obstacle(conv, bn, relu=None):
    if reason := bypass_obstacle(conv, nn.Conv2d):
        return reason
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}: only 'zeros' is supported"
    if padding_of(conv) is None:
        return f"padding={conv.padding!r} with an even kernel pads one side more than the other"
    return bypass_obstacle(bn, nn.BatchNorm2d) or (bypass_obstacle(relu, nn.ReLU) if relu is not None else "")


def _run(x, conv, bn, relu=None, *, impl):
    spec = ConvBNActSpec(
        stride=pair(conv.stride),
        padding=padding_of(conv),
        dilation=pair(conv.dilation),
        groups=conv.groups,
        eps=bn.eps,
        relu=relu is not None,
    )
    return norm_state.conv_bn_act(bn, x, conv.weight, bias=conv.bias, spec=spec, impl=impl)


FAMILY = Family(target=lambda: nn.Sequential, find=_find, mixin=FusedSequential)
