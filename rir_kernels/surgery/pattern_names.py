"""The names of the kinds of fused operations."""

# by their old codes, which are accepted in place of names
NAMES = {
    "P1": "conv_bn_act",
    "P2": "conv_bn",
    "P3": "conv_bn_add_act",
    "P4": "conv_add_bn_act",
    "P5": "bn_act",
    "P6": "conv_bn_scaled_add_act",
}
CODES = {name: code for code, name in NAMES.items()}
PATTERNS = tuple(CODES)


def pattern_name(name: str) -> str:
    """Returns the pattern's name for a name or a code; raises ValueError for anything else."""
    if name in CODES:
        return name
    if name not in NAMES:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {name!r}")
    return NAMES[name]
