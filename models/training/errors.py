"""Errors that a user can fix: the commands print them without a traceback."""

from models.data import DataError


class SettingsError(ValueError):
    """An argument, or two that do not go together."""


class CheckpointError(RuntimeError):
    """A file that is no checkpoint of this run or model, or one that could not be written."""


COMMAND_ERRORS = (SettingsError, CheckpointError, DataError, OSError)
