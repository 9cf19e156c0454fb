"""Reports when a fused unit falls back to its original forward: an entry for record_calls, and a one-time warning.

The user knows of a hook, a parametrization, a sharded weight, a norm in another mode, or of this call's arguments
(another shape, dtype or number of arguments, a DTensor). A patched class, a replaced or converted layer, or a changed
attribute or global may cost the speedup unnoticed, so these cause a warning.
"""

import torch

from ..common.warn import warn_once
from ..dispatch import calls

# reasons, or parts of them
GLOBAL_HOOK, HOOK = "a hook is registered for all modules", "a hook is registered on it"
PARAMETRIZED, WRAPPED = "it is parametrized", "a parameter of it is a"
NORMS_DIFFER = "the norms differ in mode"
_KNOWN_TO_THE_OWNER = (GLOBAL_HOOK, HOOK, PARAMETRIZED, WRAPPED, NORMS_DIFFER)

_told: set[tuple[type, str]] = set()


def note(module, inputs, reason, *, asked: bool) -> None:
    """Reports why `module` (None if unknown), or one operation of it, runs unfused.

    asked: whether the call, not the module, prevents the fused operation.
    """
    if torch.compiler.is_compiling():
        return
    if calls.on():
        calls.ran_one_by_one(module, inputs, str(reason).partition("\n")[0])
    if not asked and module is not None and (key := (type(module), reason)) not in _told:
        _told.add(key)
        if not any(text in reason for text in _KNOWN_TO_THE_OWNER):
            _warn(module._rir_fusion.original, reason)


def _warn(kind, reason):
    warn_once(
        f"what rir.fuse_ has fused in {kind.__name__} no longer runs fused: {reason}. rir.fusion_status(model) lists "
        "all such operations. Undo the change, or take the model as it is now: rir.unfuse_(model), rir.fuse_(model)."
    )
