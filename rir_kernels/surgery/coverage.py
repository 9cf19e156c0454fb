"""Accounts for every convolution and every norm of a model: in a fused operation, or why not."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..common.fused_class import class_of
from ..common.tables import THE_MODEL
from .activations import KINDS
from .bypass import activation_obstacle, conv_obstacle, norm_obstacle
from .classes import Conv2d
from .folded_norm import FoldedNorm
from .patterns import Refusal
from .reads import child, path_of
from .registry import is_inlined, is_never_called
from .report import Coverage, Skipped
from .tracer import first_line

_NO_NORM = "no norm behind it that could be fused with it"
_NO_CONVOLUTION = "no convolution in front of it, nor an activation behind it, that could be fused with it"
_SCRIPTED = "it was compiled by torch.jit: fuse the model that it was made from"
_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
_OTHER_DIMENSIONS = (nn.BatchNorm1d, nn.BatchNorm3d, nn.LazyBatchNorm1d, nn.LazyBatchNorm3d)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a Conv2d, an instance of a subclass, or was one before torch.jit compiled it."""
    if isinstance(module, ScriptModule):
        return _scripted_name(module).endswith("Conv2d")
    return isinstance(module, Conv2d)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm of images, or any other module with statistics, scale and shift per channel.

    Frozen norms keep these in buffers, in classes of many libraries, so they are recognized by what they keep.
    """
    if isinstance(module, _InstanceNorm):
        return isinstance(module, nn.InstanceNorm2d) and module.track_running_stats
    if isinstance(module, _NormBase):
        return not isinstance(module, _OTHER_DIMENSIONS)
    if isinstance(module, FoldedNorm | Conv2d):
        return False
    if isinstance(module, ScriptModule) and _scripted_name(module).endswith(("1d", "3d")):
        return False
    tensors = [_own_tensor(module, name) for name in _PER_CHANNEL]
    return all(tensor is not None and tensor.dim() == 1 for tensor in tensors)


class Ledger:
    """Records what `fuse_` finds in a model, and derives from it the result for each convolution and norm."""

    def __init__(self, model: nn.Module):
        self.operations = 0
        self.covered: set[nn.Module] = set()
        self.own: set[nn.Module] = set()  # this library's modules, which are fused already
        self.refused: dict[nn.Module, tuple[nn.Module, Refusal]] = {}  # part: in whose forward, and why
        self.closed: dict[nn.Module, str] = {}  # why nothing in a forward could be fused
        self.names: dict[nn.Module, list[str]] = defaultdict(list)
        self.parents: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            self.names[module].append(name)
        for module in self.names:
            for part in module._modules.values():
                if part is not None:
                    self.parents[part].append(module)

    def fuse(self, module: nn.Module, parts: Iterable[str]) -> None:
        """Records an operation in the module's forward that bypasses these children."""
        self.operations += 1
        for part in parts:
            self.covered.update(module.get_submodule(part).modules())

    def refuse(self, module: nn.Module, refusal: Refusal) -> None:
        """Records an operation that the module's forward might have had; without parts, all of them."""
        if not refusal.parts:
            self.closed.setdefault(module, refusal.reason)
        for part in self._parts(module, refusal):
            for one in part.modules():
                self.refused.setdefault(one, (module, refusal))

    def skipped(self, listed: set[str]) -> Iterator[Skipped]:
        """Yields an entry for each convolution and norm in no operation, unless its name is `listed` already."""
        for module, (name, *also) in self.names.items():
            if name in listed or module in self.covered:
                continue
            if is_convolution(module) or is_norm(module) or self._hides_convolutions(module):
                reason, within = self._why(module)
                yield Skipped(name, reason, class_of(module).__name__, tuple(also), within)

    def coverage(self, macs_share: float | None = None) -> Coverage:
        """Returns the coverage of the model's convolutions."""
        convolutions = self.convolutions()
        return Coverage(self.operations, len(convolutions), len(self.covered.intersection(convolutions)), macs_share)

    def convolutions(self) -> list[nn.Module]:
        return [module for module in self.names if is_convolution(module)]

    def _why(self, module):
        """Returns the reason, and the name of the module whose entry gives the same reason."""
        if isinstance(module, ScriptModule):
            outer = self._outermost(module)
            return (_SCRIPTED, None) if outer is module else self._because_of(outer, _SCRIPTED)
        own = _obstacle(module)
        if module in self.refused:
            owner, refusal = self.refused[module]
            within = self.names[owner][0]
            if own == refusal.reason:
                return own, within
            others = [part for part in self._parts(owner, refusal) if _obstacle(part) == refusal.reason]
            about = others[0] if others else owner
            return f"{self._title(about)}: {refusal.reason}", within
        for caller in self._callers(module):
            if caller in self.closed:
                return self._because_of(caller, self.closed[caller])
        return own or (_NO_NORM if is_convolution(module) else _NO_CONVOLUTION), None

    def _because_of(self, owner, reason):
        return f"{self._title(owner)}: {reason}", self.names[owner][0]

    def _title(self, module):
        return self.names[module][0] or THE_MODEL

    def _parts(self, module, refusal):
        parts = (child(module, path_of(part)) for part in refusal.parts)
        return [part for part in parts if part is not None]

    def _callers(self, module):
        """Yields the modules whose forward may call it; parents replace those that are inlined or have no forward."""
        queue, seen = [*self.parents[module]], set()
        while queue:
            caller = queue.pop(0)
            if caller not in seen:
                seen.add(caller)
                yield caller
                if is_never_called(type(caller)) or is_inlined(caller):
                    queue += self.parents[caller]

    def _outermost(self, module):
        """Returns the outermost scripted module around it."""
        around = next((parent for parent in self.parents[module] if isinstance(parent, ScriptModule)), None)
        return module if around is None else self._outermost(around)

    def _hides_convolutions(self, module):
        """Whether it is the root of what torch.jit compiled, where inlined and frozen convolutions have no module."""
        if not isinstance(module, ScriptModule) or self._outermost(module) is not module:
            return False
        code = str(getattr(module, "inlined_graph", ""))
        return any(name in code for name in ("aten::conv2d", "aten::_convolution", "batch_norm"))


def _scripted_name(module):
    return getattr(module, "original_name", "")


def _own_tensor(module, name):
    for table in (module._buffers, module._parameters):
        if name in table and isinstance(table[name], torch.Tensor):
            return table[name]
    return None


def _obstacle(module):
    """Returns the property of the module because of which no operation takes it."""
    look = activation_obstacle if isinstance(module, KINDS) else None
    look = conv_obstacle if is_convolution(module) else norm_obstacle if is_norm(module) else look
    try:
        return look(module) if look is not None else ""
    except Exception as error:
        return f"it cannot be read: {first_line(error)}"
