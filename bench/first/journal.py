"""The JSON file of one step, written after every item: a step that is killed loses no more than the item it was at."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.measure import timing
from tooling.files import save_json

SCHEMA = 1
KIND = "first"
LOST = 3  # exit status of a step whose device is lost


class Journal:
    """The items of a step by name, each {"status": "done", "failed" or "lost", "seconds", ...}.

    compiled: a list that grows with every kernel that this process compiles; an item during which it does has their
    number, as kernels should have been compiled ahead.

    A file that an earlier process left is continued: what it has is not done again, and the item that it had begun is
    "lost", since that is where the process ended. retry: items that failed or were lost are done again.
    """

    def __init__(self, path: Path, head: dict, device: torch.device, *, earlier=None, retry=False, compiled=()):
        self.path, self._device, self._compiled = path, device, compiled
        items = (earlier or {}).get("items", {})
        if begun := (earlier or {}).get("begun"):
            items[begun] = {"status": "lost", "error": "the process ended at this item"}
        if retry:
            items = {name: item for name, item in items.items() if item["status"] == "done"}
        self.items: dict[str, dict] = items
        self._data = {
            "kind": KIND, "schema": SCHEMA, **head, "status": "running", "error": None, "begun": None, "items": items,
        }  # fmt: skip
        self._save()

    def take(self, name: str, function: Callable[[], dict]) -> None:
        """Adds the item `name`, which is what function() returns, unless it is there already.

        Where the function raises, or returns a "status" other than "done", the step goes on with its next item. Where
        the device is lost with it, the process ends (`LOST`): nothing in it can use that device any more.
        """
        if name in self.items:
            return
        self._data["begun"] = name
        self._save()
        started, compiled = time.monotonic(), len(self._compiled)
        try:
            item = {"status": "done", **function()}
        except Exception as error:
            item = {"status": self._status(error), "error": f"{type(error).__name__}: {error}"[:2000]}
        item["seconds"] = round(time.monotonic() - started, 2)
        if compiled := len(self._compiled) - compiled:
            item["compiled"] = compiled
        self.items[name] = item
        self._data["begun"] = None
        self._save()
        print(": ".join(filter(None, (f"{item['status']:6} {name}", item.get("error")))), flush=True)
        if item["status"] == "lost":
            raise SystemExit(LOST)

    def finish(self) -> bool:
        """Notes that the step has come to its end; whether all of its items are done."""
        good = all(item["status"] == "done" for item in self.items.values())
        self._data["status"] = "done" if good else "failed"
        self._save()
        return good

    def _status(self, error):
        try:
            timing.check_device(self._device, error)
        except timing.DeviceLost:
            return "lost"
        return "failed"

    def _save(self):
        save_json(self.path, self._data)
