"""Measured choices of "auto": `choices/<device>.json`, written by `python -m bench choose`.

Without a measurement the rule of `dispatch` decides.
"""

from pathlib import Path

from ..common.arguments import OUR_KERNELS
from ..common.device_tables import looked_up_once, read_entries, slug

SCHEMA = 1
FOLDER = Path(__file__).with_name("choices")

# (C_in, C_out, kernel height, stride, rows of the image, dtype, training)
Key = tuple[int, int, int, int, int, str, bool]


def measured_choice(device_name: str, key: Key) -> str | None:
    """The implementation measured to be fastest, None without a measurement."""
    return _load(FOLDER / f"{slug(device_name)}.json").get(key)


@looked_up_once
def _load(path) -> dict[Key, str]:
    return read_entries(
        path, SCHEMA, "choices", lambda entry: _entry(**entry),
        instead='"auto" goes by its rule', command="bench choose",
    )  # fmt: skip


def _entry(*, c_in, c_out, kernel, stride, rows, dtype, training, impl):
    numbers = (c_in, c_out, kernel, stride, rows)
    if not all(type(number) is int and number > 0 for number in numbers) or type(training) is not bool:
        raise ValueError(f"expected positive integers and a flag, got {(*numbers, training)}")
    if impl not in OUR_KERNELS:
        raise ValueError(f"expected one of {', '.join(OUR_KERNELS)}, got {impl!r}")
    return (c_in, c_out, kernel, stride, rows, str(dtype), training), impl
