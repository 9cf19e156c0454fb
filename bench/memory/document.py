"""What people read of the counts: blocks of docs/memory.md and the README, and the chart between them."""

import json
from pathlib import Path

from bench.memory.chart import bars
from bench.memory.networks import FORMS
from bench.report.document import table
from bench.report.headline import replaced
from bench.schema import ResultsError

KIND, SCHEMA = "memory", 1
COUNTED = Path("bench/results/counted/memory.json")
MARKERS = "<!-- memory:begin -->", "<!-- memory:end -->"
PAGE, PICTURE = Path("docs/memory.md"), Path("docs/memory.png")


def load(path: str | Path) -> dict:
    """The file's contents; ResultsError where it is something else, with what came and how to fix it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(
            f"{path}: cannot be read as JSON ({error}): pass what `python -m bench memory` wrote"
        ) from error
    found = (data.get("kind"), data.get("schema")) if isinstance(data, dict) else type(data).__name__
    if found != (KIND, SCHEMA):
        raise ResultsError(f"{path}: expected kind and schema {(KIND, SCHEMA)}, got {found}: count again")
    return data


def header() -> list[str]:
    return ["network", *FORMS.values()]


def cells(found: dict) -> list[list[str]]:
    """A row for each network: gigabytes for the batch, and megabytes for each further image, "-" where not counted."""
    rows = {}
    for row in found["rows"]:
        rows.setdefault(row["title"], {})[row["form"]] = row
    return [[title, *(_cell(own.get(form)) for form in FORMS)] for title, own in rows.items()]


def _cell(row):
    return f"{row['bytes'] / 1e9:.2f} ({row['per_image'] / 1e6:.2f})" if row else "-"


def texts(found: dict) -> dict[Path, str]:
    """What belongs between the markers of each file."""
    counted = _counted(found)
    alt = f"![Memory kept for backward with {found['batch']} images, by network and form]"
    fixed = {row["title"]: row["fixed"] for row in found["rows"] if row["form"] == "eager"}
    pixels = {row["title"]: row["size"] for row in found["rows"]}
    parts = [
        f"{counted} Gigabytes for a batch of {found['batch']} and, in brackets, megabytes for each image; "
        f"images of {', '.join(f'{size} pixels ({title})' for title, size in pixels.items())}:",
        table(header(), cells(found)),
        "Included is what does not grow with the batch, mostly the weights that autocast has rounded to 16 bits: "
        + ", ".join(f"{title} {size / 1e6:.0f} MB" for title, size in fixed.items())
        + ".",
        f"{alt}({PICTURE.name})",
    ]
    return {PAGE: "\n\n".join(parts), Path("README.md"): "\n\n".join([_summary(found), f"{alt}({PICTURE.as_posix()})"])}


def _counted(found):
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "torchvision"))
    return f"Counted, not measured: no GPU was used ({found['created'][:10]}, {versions})."


def _summary(found):
    """Each form against eager, for the networks of which all were counted."""
    size = {(row["network"], row["form"]): row["bytes"] for row in found["rows"]}
    others = [form for form in FORMS if form != "eager"]
    rows = []
    for network, title in {row["network"]: row["title"] for row in found["rows"]}.items():
        if all((network, form) in size for form in FORMS):
            eager = size[network, "eager"]
            rows.append([title, f"{eager / 1e9:.2f} GB", *(_change(size[network, form] / eager) for form in others)])
    return f"{_counted(found)} With {found['batch']} images:\n\n" + table(header(), rows)


def _change(ratio):
    percent = round(100 * (ratio - 1))
    return f"{percent:+d} %".replace("-", "\N{MINUS SIGN}") if percent else "0 %"


def update(root: Path) -> list[Path]:
    """Rewrites the blocks and the chart under `root`, the checkout, from its COUNTED; the pages that have changed.

    ValueError where the markers are missing.
    """
    found, changed = load(root / COUNTED), []
    for path, old, new in _pages(root, found):
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    (root / PICTURE).write_bytes(bars(found))
    return changed


def current(root: Path) -> bool:
    """Do the pages say what the counts say? ValueError where the markers are missing."""
    return all(old == new for _, old, new in _pages(root, load(root / COUNTED)))


def _pages(root, found):
    for name, text in texts(found).items():
        old = (root / name).read_text(encoding="utf-8")
        yield root / name, old, replaced(old, text, root / name, MARKERS)
