"""Tiles as text: what `--explain` prints, and `--tile` takes."""

from rir_kernels.triton.tiling.tile import FIELDS, ConvConfig

_TILE = ("walk", "box", *(f"block_{side}" for side in ("c", "k", "co", "ci")), "num_warps", "num_stages")


def described(options: dict) -> str:
    """A tile as `--tile` takes it, such as "box=4,1,32 block_c=128 block_k=32 num_warps=8 num_stages=4 rows=2"."""
    options = {FIELDS.get(name, name.lower()): value for name, value in options.items()}
    parts = {name: options[name] for name in _TILE if name in options}
    parts |= {name: options[name] for name in ("groups", "rows") if options.get(name, 1) > 1}
    parts |= {name: 1 for name in ("skips", "fold") if options.get(name)}
    return " ".join(f"{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in parts.items())


def tile_of(text: str) -> ConvConfig:
    """The convolution's tile of such a text; ValueError where it is none."""
    fields = {}
    try:
        for name, _, value in (part.partition("=") for part in text.split()):
            fields[name] = tuple(map(int, value.split(","))) if name == "box" else int(value)
        return ConvConfig(**fields)
    except (ValueError, TypeError) as error:
        expected = "'box=4,1,32 block_c=128 block_k=32 num_warps=8 num_stages=4', and groups, rows, skips=1 or fold=1"
        raise ValueError(f"--tile: expected {expected}, got {text!r} ({error})") from None
