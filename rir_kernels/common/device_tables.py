"""What was measured on a device and is shipped as data: JSON files named after it.

A file is data, never code: what has not the expected form is ignored, with a warning, and a rule decides instead. So is
a file that others than the owner of this code could have written.
"""

import functools
import json
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

MOST_BYTES = 16 * 2**20  # a device's tiles take some hundred kilobytes


def slug(name: str) -> str:
    """A device's name as the name of a file or folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def looked_up_once(function: Callable) -> Callable:
    """functools.cache, for threads: what several ask for at a time is read, and warned of, once."""
    cached, lock = functools.cache(function), threading.Lock()

    @functools.wraps(function)
    def look_up(*args):
        with lock:
            return cached(*args)

    look_up.cache_clear = cached.cache_clear  # type: ignore[attr-defined] # as functools.cache has it
    return look_up


def read_entries(path: Path, schema: int, field: str, parse: Callable, *, instead: str, command: str) -> dict:
    """dict(parse(entry) for every entry under `field`); empty where there is no file, or none of that form.

    parse may raise whatever it likes for what is no entry. The warning says what happens `instead`, and which `command`
    writes the file.
    """
    try:
        data = json.loads(_read(path))
        if data["schema"] != schema:
            raise ValueError(f"expected schema {schema}, got {data['schema']}")
        return dict(parse(entry) for entry in data[field])
    except FileNotFoundError:
        return {}
    except Exception as error:  # a file that was made to fail may fail in any way: too deep, too large, no number
        warnings.warn(
            f"{path.name} is ignored, {instead}: {type(error).__name__}: {error}. "
            f"Write it again with `python -m {command}`, or remove it",
            stacklevel=3,
        )
        return {}


def _read(path):
    # a pipe must not block here, and what is looked at is what is read: the file may be replaced in between
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_origin(os.fstat(handle))
        with open(handle, encoding="utf-8", closefd=False) as file:
            text = file.read(MOST_BYTES + 1)
    finally:
        os.close(handle)
    if len(text) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes")
    return text


def _check_origin(found):
    """PermissionError for what more people can write than can write this code, ValueError for what is no file."""
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a file")
    if os.name != "posix":
        return
    code = os.stat(__file__)
    if found.st_uid not in (0, os.geteuid(), code.st_uid):
        raise PermissionError(f"it belongs to user {found.st_uid}")
    if found.st_mode & ~code.st_mode & stat.S_IWOTH:
        raise PermissionError("everyone may write to it")
