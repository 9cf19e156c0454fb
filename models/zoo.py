"""The paper's networks by name, and what each of them costs."""

import difflib
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from rir_kernels import reference

from .rir import THIN, WIDE, RiR

_SWITCHES = {
    "cnn18": {"inner_shortcut": False, "outer_shortcut": False},
    "resnet18": {"inner_shortcut": False, "outer_shortcut": True},
    "resnet_init18": {"inner_shortcut": True, "outer_shortcut": False},
    "rir18": {"inner_shortcut": True, "outer_shortcut": True},
}
_NETWORKS = {
    f"{name}_{size}": switches | {"width": width}
    for size, width in (("wide", WIDE), ("thin", THIN))
    for name, switches in _SWITCHES.items()
}


def list_models() -> list[str]:
    """The names that `create` knows."""
    return list(_NETWORKS)


def create(name: str, num_classes: int = 10, **options) -> RiR:
    """The network `name` of list_models(), with new weights; `options` go to models.RiR, which documents them.

    ValueError for a name that is not there, and for switches, which are part of the name. A width replaces the name's.
    """
    if name not in _NETWORKS:
        close = difflib.get_close_matches(str(name), _NETWORKS, 1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no network is called {name!r}{hint} There are: {', '.join(_NETWORKS)}")
    decided = [option for option in options if option in ("inner_shortcut", "outer_shortcut")]
    if decided:
        raise ValueError(
            f"{', '.join(decided)} is decided by the name {name!r}: choose another name, or use models.RiR"
        )
    return RiR(num_classes, **_NETWORKS[name] | options)


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds of convolutions and matrix products for one image."""

    parameters: int
    macs: int


def cost(name: str, num_classes: int = 10, *, image_size: int = 32, **options) -> Cost:
    """What create(name, num_classes, **options) costs for an image (3, image_size, image_size), on the meta device."""
    model = create(name, num_classes, **options, layers=reference, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    # the counter takes a multiply-add for two operations
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
