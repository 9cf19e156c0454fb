"""What "auto" chooses where it was measured: `choices/<device>.json`, written by `python -m bench choose`.

A file is data: what has not the expected form is ignored, with a warning, and the rule of `dispatch` decides.
"""

import functools
import json
import re
import warnings
from pathlib import Path

SCHEMA = 1
FOLDER = Path(__file__).with_name("choices")
CANDIDATES = ("triton", "hybrid")

# (C_in, C_out, kernel height, stride, rows of the image, dtype, training)
Key = tuple[int, int, int, int, int, str, bool]


def measured_choice(device_name: str, key: Key) -> str | None:
    """The implementation that was fastest there, None where it was not measured."""
    return _load(FOLDER / f"{slug(device_name)}.json").get(key)


def slug(name: str) -> str:
    """A device's name as the name of a file or folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _load(path) -> dict[Key, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, got {data['schema']}")
        return dict(_entry(**entry) for entry in data["choices"])
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(
            f'{path.name} is ignored, "auto" goes by its rule: {type(error).__name__}: {error}. '
            "Write it again with `python -m bench choose`, or remove it",
            stacklevel=2,
        )
        return {}


def _entry(*, c_in, c_out, kernel, stride, rows, dtype, training, impl):
    numbers = (c_in, c_out, kernel, stride, rows)
    if not all(type(number) is int and number > 0 for number in numbers) or type(training) is not bool:
        raise ValueError(f"expected positive integers and a flag, got {(*numbers, training)}")
    if impl not in CANDIDATES:
        raise ValueError(f"expected one of {', '.join(CANDIDATES)}, got {impl!r}")
    return (c_in, c_out, kernel, stride, rows, str(dtype), training), impl
