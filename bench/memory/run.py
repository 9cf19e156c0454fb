"""From the networks' names to the file."""

import importlib.metadata
import itertools
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench.memory.document import KIND, SCHEMA, cells, header
from bench.memory.networks import FORMS, NETWORKS, absent, count
from tooling import console, provenance
from tooling.files import now, save_json


def run(names: Iterable[str], batch: int, folder: Path, *, command: Sequence[str]) -> Path | None:
    """Counts the networks of these names, all where there is none, prints a table and leaves `folder`/memory.json.

    What a library or a package is missing for is named; None where nothing could be counted.
    """
    networks = {name: NETWORKS[name] for name in dict.fromkeys(names)} or NETWORKS
    found = _new(batch, command)
    with console.progress("memory", len(networks) * len(FORMS)) as reach:
        for index, (name, form) in enumerate(itertools.product(networks, FORMS)):
            network = networks[name]
            reach(index, f"{network.title}, {FORMS[form]}")
            if reason := absent(network, form):
                console.say(f"{network.title}, {FORMS[form]}: {reason}")
                continue
            counted = count(network, form, batch)
            found["rows"].append(
                {
                    "network": name, "title": network.title, "size": network.size, "form": form,
                    "per_image": counted.per_image, "fixed": counted.fixed, "bytes": counted.at(batch),
                }
            )  # fmt: skip
    if not found["rows"]:
        return None
    title = f"Kept for backward with {batch} images: GB, and MB for each (counted)"
    console.table(header(), cells(found), title=title)
    return save_json(folder / "memory.json", found)


def _new(batch, command):
    found = {
        "kind": KIND,
        "schema": SCHEMA,
        "created": now(),
        "command": shlex.join(["python", "-m", "bench", *command]),
        **provenance.of_a_run(torch.device("cpu"), KIND),
        "device": {"name": "none", "type": "counted"},
        "batch": batch,
        "rows": [],
    }
    try:
        found["versions"]["torchvision"] = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        found["versions"]["torchvision"] = "absent"
    return found
