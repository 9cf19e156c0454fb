"""Files that are whole or absent, and JSON."""

import datetime
import json
import math
import os
import threading
from pathlib import Path


def now() -> str:
    """UTC, as results have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def save_json(path: str | Path, data: dict) -> Path:
    """`save_text` of the data as JSON."""
    return save_text(path, json.dumps(jsonable(data), indent=1) + "\n")


def save_text(path: str | Path, text: str) -> Path:
    """Writes the file in one step: a reader, or a run that is killed, never meets half of one.

    Of several writers at a time the last one's file stays, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # one draft per writer: two would mix in one
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def jsonable(value):
    """JSON has no infinity and no NaN: None stands for them."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
