"""Interpreters by version, wherever this machine has them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path


def find_python(version: str, named: Mapping[str, str] | None = None) -> str:
    """An interpreter of that version, such as "3.12"; `named` ones, {version: path}, go first.

    LookupError where there is none, with how to name one.
    """
    for candidate in _candidates(version, named or {}):
        if _version(candidate) == version:
            return candidate
    raise LookupError(f"no Python {version} was found: put python{version} on PATH, or pass --python {version}=PATH")


def _candidates(version, named) -> Iterator[str]:
    if version in named:
        yield named[version]
    yield sys.executable
    yield f"python{version}"
    # pyenv's python3.12 answers only where that version is chosen for the folder
    if shutil.which("pyenv"):
        for name in _output("pyenv", "versions", "--bare").split():
            if name.startswith(f"{version}."):
                yield str(Path(_output("pyenv", "prefix", name)) / "bin" / "python")


def _version(python):
    return _output(python, "-c", "import sys; print('{}.{}'.format(*sys.version_info))")


def _output(*command):
    """What the command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
