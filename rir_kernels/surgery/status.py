"""fusion_status and fused_source: which operations run fused now, and the source that replaces a module's forward."""

import inspect
import textwrap
from dataclasses import dataclass

from torch import nn

from ..common.fused_class import class_of
from ..common.tables import Table
from .bypass import call_obstacle
from .class_swap import changed_class, is_fused
from .fuse import check_model


@dataclass(frozen=True)
class OperationStatus:
    """One operation of a fused model.

    name: the module whose forward was replaced, as in named_modules ("" is the model itself). pattern:
    "conv_bn_act" and so on.
    fused: whether it would run fused now. reason: why not, or an empty string.
    """

    name: str
    pattern: str
    fused: bool
    reason: str


class FusionStatus(Table):
    """Lists the operations of a model, in the order of its modules and their forwards."""

    kind = OperationStatus

    def __init__(self, operations, title: str):
        super().__init__(operations)
        self.title = title

    def headline(self) -> str:
        """Returns the counts in one line."""
        return f"{self.title}: {sum(one.fused for one in self)} of {len(self)} operations run fused"


def fusion_status(model: nn.Module) -> FusionStatus:
    """Lists all operations that `fuse_` has put into `model`, whether each would run fused now, and if not, why.

    Each has `.name .pattern .fused .reason`, see OperationStatus. The reasons come from the checks that every call
    makes of the modules: hooks, replaced or converted layers, patched classes, changed attributes and globals. They
    don't include what depends on the call's tensors (their shapes, dtypes and number), which `record_calls` lists. A
    module that has replaced a fused one is not listed. No forward runs, and nothing is changed.

    Raises TypeError if the model is not an nn.Module.
    """
    check_model(model)
    operations = [
        OperationStatus(name, pattern, not reason, reason)
        for name, module in model.named_modules()
        if is_fused(module)
        for pattern, reason in _operations(module)
    ]
    return FusionStatus(operations, class_of(model).__name__)


def fused_source(module: nn.Module) -> str:
    """Returns the Python source that runs instead of the forward of `module`, which fuse_ has fused.

    Raises TypeError if it is not an nn.Module, ValueError if it is not fused, and OSError if the source of a registered
    forward cannot be read.
    """
    check_model(module)
    if not is_fused(module):
        raise ValueError(
            f"module must be fused, got a {type(module).__name__} that runs its own forward: call rir.fuse_(model) "
            "first; rir.fusion_status(model) names the modules that are fused"
        )
    recipe = module._rir_fusion
    if recipe.program is not None:
        return recipe.program.source
    return textwrap.dedent(inspect.getsource(recipe.mixin.forward))


def _operations(module):
    """Returns (pattern, reason) of each operation; reasons for the whole module take precedence, as in a call."""
    whole = _covered(module) or changed_class(module) or call_obstacle()
    return [(pattern, whole or reason) for pattern, reason in module._rir_operations()]


def _covered(module):
    """Returns why a call does not reach our forward, looking through wrappers that name what they wrap."""
    forward = module.forward
    while forward is not None:
        if getattr(forward, "__func__", forward) is type(module)._rir_forward:
            return ""
        forward = getattr(forward, "__wrapped__", None)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return f"{type(module).__name__} has another forward, which was put on top"
