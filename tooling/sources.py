"""Which code a figure depends on, as one hash that changes when that code changes, and only then.

The modules are found by following imports from those that the figure is taken of, the ones written as
importlib.import_module("...") too. A package's __init__ counts only for names that are taken from it: Python runs every
one above a module, but that decides no figure. Each module counts by what it does (`syntax`): another module stands in
it as a hash of that one's contents, so that no path decides anything. Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tooling.syntax import Module, read_module

PACKAGE = Path(__file__).resolve().parent.parent / "rir_kernels"

_CONVOLUTIONS = ("rir_kernels.triton.launch.conv", "rir_kernels.triton.launch.wgrad")
_LAUNCHERS = (*_CONVOLUTIONS, "rir_kernels.backends.cudnn")
_LAYERS = ("rir_kernels.modules",)
_NETWORKS = (*_LAYERS, "rir_kernels.surgery")
_GPU = {"type": "cuda"}


class Kind(NamedTuple):
    """Where the imports of a kind of figure begin, and its device where that is not the one of the run."""

    entries: tuple[str, ...]
    device: dict | None = None


KINDS = {
    "kernels": Kind(_LAUNCHERS),
    "layers": Kind(_LAYERS),
    "models": Kind(_NETWORKS),
    "training": Kind(_LAYERS),
    "ablation": Kind(_LAYERS),
    "memory": Kind(_NETWORKS, _GPU),  # bytes are counted anywhere, and are those of the kernels
    "simulated": Kind(_CONVOLUTIONS, _GPU),  # of a GPU that need not be there
    "machine": Kind(_NETWORKS, _GPU),  # what the emulated GPU's tests are about
    "first": Kind(_NETWORKS),
    "matrix": Kind((*_NETWORKS, "rir_kernels.triton.inspect"), _GPU),
}
# the reference is what figures are compared with
_LEFT_OUT = {"cuda": ("rir_kernels.reference",), "cpu": ("rir_kernels.reference", "rir_kernels.triton")}


def sources_hash(kind: str = "models", device: dict = _GPU, package: Path = PACKAGE) -> str:
    """SHA-256, as 64 hexadecimal digits, of what decides figures of this kind (one of KINDS) on that device.

    device: "type" ("cuda" or "cpu") and, where tiles were measured on it, "name", as `provenance.describe` gives them.
    ValueError for another device, and for an import that cannot be followed.
    """
    entries, fixed = KINDS[kind]
    device = fixed or device
    if not isinstance(device, dict) or device.get("type") not in _LEFT_OUT:
        raise ValueError(f"expected a device with a type, one of {', '.join(_LEFT_OUT)}, got {device!r}")
    modules = _closure(package, entries, _LEFT_OUT[device["type"]])
    contents = {name: _sha(module.text(lambda _: "module")) for name, module in modules.items()}
    parts = [module.text(lambda name: contents.get(name, "left out")) for module in modules.values()]
    if device["type"] == "cuda" and "name" in device:
        parts += _measured_tiles(package, device["name"])
    return _sha("\n".join(sorted(map(_sha, parts))))


def _closure(package, entries, left_out) -> dict[str, Module]:
    """The modules that are reached from `entries`, by dotted name; nothing in `left_out` is."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    known, found, waiting = frozenset(files), {}, list(entries)
    while waiting:
        name = waiting.pop()
        if name in found or any(f"{name}.".startswith(f"{part}.") for part in left_out):
            continue
        if name not in files:
            raise ValueError(f"there is no module {name}: correct the import, or tooling/sources.py where it is named")
        found[name] = read_module(name, files[name].read_bytes(), files[name].name == "__init__.py", known)
        waiting += found[name].reached
    return found


def _measured_tiles(package, device_name) -> Iterator[str]:
    """Problems and their tiles, from `tiles/<device>.json`; which times they had decides nothing."""
    from rir_kernels.common.device_tables import slug

    for path in package.rglob(f"tiles/{slug(device_name)}.json"):
        try:
            lists = [entries for entries in json.loads(path.read_bytes()).values() if isinstance(entries, list)]
            chosen = [{key: entry[key] for key in ("problem", "tile")} for entries in lists for entry in entries]
        except (ValueError, AttributeError, KeyError, TypeError):  # the kernels ignore such a file too
            continue
        yield json.dumps(chosen, sort_keys=True)


def _sha(text):
    return hashlib.sha256(text.encode()).hexdigest()
