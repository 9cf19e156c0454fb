"""A plugin for pytest: refuses to run where another copy of the package would be imported than the one beside it."""

import importlib.util
from pathlib import Path

import pytest


def pytest_configure(config):
    found = Path(importlib.util.find_spec("rir_kernels").origin)
    expected = config.rootpath / "rir_kernels" / "__init__.py"
    if found != expected:
        raise pytest.UsageError(f"rir_kernels would be imported from {found}, expected {expected}")
