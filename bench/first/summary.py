"""What the steps found, in a page of text: first of all the training steps of networks."""

import json
from pathlib import Path

from bench.first.networks import COMPILED, EAGER, OURS
from bench.first.steps import STEPS, file_of


def summary(out: Path) -> str:
    """Markdown of the files in `out`; what was not reached is left out."""
    steps = {name: json.loads(file_of(out, name).read_text()) for name in STEPS if file_of(out, name).exists()}
    parts = [_head(steps), _networks(steps.get("networks")), _exactness(steps), _kernels(steps.get("kernels"))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(steps):
    head = next((data for data in steps.values() if "device" in data), None)
    if head is None:
        return "Nothing was reached."
    versions = head["versions"]
    text = f"# {head['device']['name']}\n\ntorch {versions['torch']}, Triton {versions['triton']}, {head['created']}"
    return text + ("\n\nOn a stand-in: no figure here means anything." if head["dry"] else "")


def _networks(data):
    """The times taken in turns, else those that each form took by itself."""
    if data is None:
        return ""
    items = data["items"]
    lines = ["| training step | form | ms | images/s | peak MiB | time of eager's |", "|---|---|---|---|---|---|"]
    for network in dict.fromkeys(name.split(", ")[0] for name in items):
        alone = {label: items.get(f"{network}, {label}", {}) for label in (EAGER, COMPILED, OURS)}
        times = items.get(f"{network}, in turns", {}).get("times", alone)
        right = items.get(f"{network}, is right", {}).get("passed")
        for label, first in alone.items():
            timed = times.get(label, {})
            if "ms" not in timed:
                continue
            judged = {True: " (judged right)", False: " (WRONG)", None: " (not judged)"}[right] if label == OURS else ""
            peak = "" if first["peak_mib"] is None else f"{first['peak_mib']:.0f}"
            eager = times.get(EAGER, {}).get("ms")
            ratio = "" if eager is None else f"{timed['ms'] / eager:.2f}"
            lines.append(
                f"| {network} x{first['batch']} | {label}{judged} | {timed['ms']:.2f} | {timed['images_per_s']:.0f} | "
                f"{peak} | {ratio} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _exactness(steps):
    lines = []
    for name in ("precompile", "exactness", "layer", "tests"):
        if name in steps:
            items = steps[name]["items"]
            bad = [
                f"{item['status']}: {key}: {item.get('error')}"
                for key, item in items.items()
                if item["status"] != "done"
            ]
            lines.append(f"- {name}: {len(items) - len(bad)} of {len(items)} items done")
            lines += [f"  - {line}" for line in bad]
    return "\n".join(lines)


def _kernels(data):
    if data is None:
        return ""
    lines = ["| kernel | microseconds |", "|---|---|"]
    for name, item in data["items"].items():
        if "times" in item:
            times = [f"{label} {1e3 * t['ms']:.1f}" for label, t in item["times"].items() if "ms" in t]
            lines.append(f"| {name} | {', '.join(times)} |")
        elif "ms" in item:
            lines.append(f"| {name} | {1e3 * item['ms']:.1f} |")
    return "\n".join(lines) if len(lines) > 2 else ""
