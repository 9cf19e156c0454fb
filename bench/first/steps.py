"""The steps in their order, and how one is run: in this process, or as a piece of the whole in a separate one."""

import importlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.first import STEPS
from bench.first.journal import KIND, SCHEMA, Journal
from bench.first.machine import prepare
from bench.pieces import Piece, State, sources_now, work
from tooling import provenance
from tooling.files import now, save_json, save_text
from tooling.process import Ended


def file_of(out: Path, name: str) -> Path:
    return out / f"first-{name}.json"


def run_step(name: str, out: Path, command: Sequence[str], *, dry: bool, retry: bool, seconds: float) -> bool:
    """Runs the step in this process, which may be ended after so many seconds; whether all of its items are done."""
    machine, context = prepare(dry)
    with context:
        head = {
            "step": name,
            "dry": dry,
            "created": now(),
            "command": shlex.join(["python", "-m", "bench", *command]),
            **provenance.of_a_run(machine.device, KIND),
        }
        path = file_of(out, name)
        earlier = _read(path)
        made_with = [(data.get("sources_hash"), data.get("device", {}).get("name")) for data in (earlier, head)]
        if made_with[0] != made_with[1]:  # other kernels, or another GPU
            earlier = {}
        journal = Journal(path, head, machine.device, earlier=earlier, retry=retry, compiled=_compiled())
        importlib.import_module(f"bench.first.{name}").run(journal, machine, seconds)
        return journal.finish()


def _compiled() -> list[str]:
    """A list to which the names of kernels are added as this process compiles them."""
    from triton import knobs

    names = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or names.append(src.name)
    return names


def run_all(out: Path, minutes: float, *, dry: bool) -> bool:
    """All steps, as far as the minutes go, each in a separate process; whether none failed."""
    good = work([StepPiece(name, out, dry) for name in STEPS], minutes)
    from bench.first.summary import summary

    text = summary(out)
    print(f"\n{text}", flush=True)
    save_text(out / "first.md", text)
    return good


def _read(path) -> dict:
    """What is there of the file, empty where it is not a step's."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) and (data.get("kind"), data.get("schema")) == (KIND, SCHEMA) else {}


def _is_stale(data) -> bool:
    """Whether the file is of other kernels; one that a step left when it crashed before its start is of none."""
    device = data.get("device")
    return device is not None and data["sources_hash"] != sources_now(KIND, device["type"], device["name"])


@dataclass(frozen=True)
class StepPiece(Piece):
    """A step that runs in a separate process."""

    name: str
    out: Path
    dry: bool = False
    silent: float | None = None

    @property
    def seconds(self) -> float:
        return STEPS[self.name]

    def state(self) -> State:
        data = _read(file_of(self.out, self.name))
        if not data or _is_stale(data):
            return State()
        items = data["items"]
        failed = [name for name, item in items.items() if item["status"] != "done"]
        parts = [data["status"], f"{len(items) - len(failed)} of {len(items)} items done"]
        if data["error"]:
            parts.append(data["error"])
        parts += [f"{items[name]['status']}: {name}" for name in failed[:3]]
        ended = data["status"] not in ("running", "done")
        return State(True, data["status"] == "done", ended, len(items), "; ".join(parts))

    def command(self, seconds, retry):
        switches = [*["--dry"] * self.dry, *["--retry"] * retry]
        return ["first", "--step", self.name, "--out", str(self.out), "--seconds", f"{seconds:.0f}", *switches]

    def ended(self, how: Ended) -> None:
        path = file_of(self.out, self.name)
        data = _read(path)
        if not data or data["status"] != "running":
            if how.code == 1 and data:
                return  # it came to its end, and said what failed
            data = data or {
                "kind": KIND,
                "schema": SCHEMA,
                "step": self.name,
                "dry": self.dry,
                "begun": None,
                "items": {},
            }
        at = f", at {data['begun']}" if data["begun"] else ""
        data["status"] = "killed" if how.why else "crashed"
        data["error"] = f"{how.why or f'exit status {how.code}'}{at}"
        data["log"] = list(how.lines)
        save_json(path, data)
