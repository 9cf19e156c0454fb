"""A pickle that would run a command."""

import os


class Executed:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.system, (f"touch {self._path}",)
