"""Measurements of a device, shipped as JSON files named after it.

A file is data, never code: a file without the expected form is ignored with a warning, and a rule decides instead. So
is a file that users other than the owner of this code could have written.
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

MOST_BYTES = 16 * 2**20  # a device's tiles take a few hundred kilobytes


def slug(name: str) -> str:
    """Turns a device's name into the name of a file or folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def looked_up_once(function: Callable) -> Callable:
    """A thread-safe functools.cache: concurrent look-ups of the same thing read it, and warn of it, once."""
    cached, lock = functools.cache(function), threading.Lock()

    @functools.wraps(function)
    def look_up(*args):
        with lock:
            return cached(*args)

    look_up.cache_clear = cached.cache_clear  # type: ignore[attr-defined] # as functools.cache has it
    return look_up


def read_entries(path: Path, schema: int, field: str, parse: Callable, *, instead: str, command: str) -> dict:
    """Returns dict(parse(entry) for every entry under `field`), or an empty dict without a file of that form.

    parse may raise any exception for an invalid entry. The warning says what happens `instead`, and which `command`
    writes the file.
    """
    try:
        data = json.loads(_read(path))
        if data["schema"] != schema:
            raise ValueError(f"expected schema {schema}, got {data['schema']}")
        return dict(parse(entry) for entry in data[field])
    except FileNotFoundError:
        return {}
    except Exception as error:  # a crafted file may fail in any way: nested too deep, too large, not a number
        warnings.warn(
            f"{path.name} is ignored, {instead}: {type(error).__name__}: {error}. "
            f"Write it again with `python -m {command}`, or remove it",
            stacklevel=3,
        )
        return {}


def _read(path):
    # opening a pipe must not block; fstat checks the very file that is read: its path may be replaced in between
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
    """Raises PermissionError if more users can write the file than this code, ValueError if it is no regular file."""
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a file")
    if os.name != "posix":
        return
    code = os.stat(__file__)
    if found.st_uid not in (0, os.geteuid(), code.st_uid):
        raise PermissionError(f"it belongs to user {found.st_uid}")
    if found.st_mode & ~code.st_mode & stat.S_IWOTH:
        raise PermissionError("everyone may write to it")
