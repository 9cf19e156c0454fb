"""What is said where a fused unit runs its own forward: an entry for record_calls, and a warning, once.

Its owner knows of a hook, a parametrization, a sharded weight, a norm in another mode, or of what is given to this call
(another shape, dtype or number of arguments, a DTensor). A class that was patched, a layer that was replaced or
converted, an attribute or a global that changed may have cost the speed without anybody noticing: that is warned of.
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
    """Says why `module`, None where that is not known, runs one by one: as a whole, or one operation of it.

    asked: whether it is the call that cannot be one operation, not the module.
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
