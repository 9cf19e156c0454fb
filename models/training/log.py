"""The numbers of every epoch: as JSON lines, and as curves."""

import json
from pathlib import Path

from tooling.files import save_text


def append(path: Path, record: dict) -> None:
    """One more line; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write(path: Path, records: list[dict]) -> None:
    """Replaces the file by these lines, in one step."""
    save_text(path, "".join(json.dumps(record) + "\n" for record in records))


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """A PNG of both losses and both accuracies by epoch, a colour for each run of {name: records}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")  # not pyplot: no window, no global state
    losses, accuracies = figure.subplots(1, 2)
    for index, (name, records) in enumerate(runs.items()):
        epochs = [record["epoch"] for record in records]
        for axes, what in ((losses, "loss"), (accuracies, "accuracy")):
            axes.plot(epochs, [r[f"train_{what}"] for r in records], color=f"C{index}", linestyle=":")
            axes.plot(epochs, [r[f"test_{what}"] for r in records], color=f"C{index}", label=name)
    losses.set(xlabel="epoch", ylabel="cross-entropy (dotted: in training)", yscale="log")
    accuracies.set(xlabel="epoch", ylabel="accuracy, % (dotted: in training)")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
    accuracies.legend(loc="lower right")
    figure.savefig(path, dpi=120)
