"""What was measured on a device and is shipped as data: JSON files named after it.

A file is data, never code: what has not the expected form is ignored, with a warning, and a rule decides instead.
"""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path


def slug(name: str) -> str:
    """A device's name as the name of a file or folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_entries(path: Path, schema: int, field: str, parse: Callable, *, instead: str, command: str) -> dict:
    """dict(parse(entry) for every entry under `field`); empty where there is no file, or none of that form.

    parse raises KeyError, TypeError or ValueError for what is no entry. The warning says what happens `instead`, and
    which `command` writes the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != schema:
            raise ValueError(f"expected schema {schema}, got {data['schema']}")
        return dict(parse(entry) for entry in data[field])
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(
            f"{path.name} is ignored, {instead}: {type(error).__name__}: {error}. "
            f"Write it again with `python -m {command}`, or remove it",
            stacklevel=3,
        )
        return {}
