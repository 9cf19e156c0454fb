"""The paper's table: python -m models.reproduce --data PATH --out DIR [--minutes 9]

Trains the four wide networks (arXiv 1603.08029) by the paper's recipe, several seeds each, one after the other. What is
finished is not run again and what was stopped goes on, so the same command, called again and again, gets through in
pieces. At the end of each piece: results.json, table.md and curves.png of what is there.

With --peers the RiR is also trained as naive layers, eager and compiled: the time to the same accuracy.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from models.data import load
from models.training import checkpoint, log, settings, state
from models.training.command import carry_out
from models.training.errors import COMMAND_ERRORS, SettingsError
from models.training.ranks import joined
from models.training.run import CHECKPOINT, Run
from tooling import provenance
from tooling.console import say
from tooling.files import save_json

NETWORKS = ("cnn18", "resnet18", "resnet_init18", "rir18")
PAPER = {"rir18_wide": 94.99, "resnet18_wide": 93.95}  # what is printed there, on CIFAR-10
PEERS = {"naive": {"impl": "reference"}, "naive, compiled": {"impl": "reference", "compile": True}}


def plan(args) -> list[tuple[str, str, dict]]:
    """(folder, label, settings) of every run, seed by seed: an early look at all networks."""
    common = {name: getattr(args, name) for name in ("data", "recipe", "epochs") if getattr(args, name) is not None}
    common |= {"graphs": True} if args.graphs else {}
    runs = []
    for seed in range(args.seeds):
        for network in args.networks:
            name = f"{network}_{args.width}"
            runs.append((f"{name}-seed{seed}", name, common | {"model": name, "seed": seed}))
    if args.peers:
        name = f"rir18_{args.width}"
        for label, changes in PEERS.items():
            folder = f"{name}-{label.replace(', ', '-')}-seed0"
            runs.append((folder, f"{name}, {label}", common | {"graphs": False, "model": name, "seed": 0} | changes))
    return runs


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 where all is done or the time is over, 130 after a signal, 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m models.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="PATH", help="CIFAR-10, as models.train takes it")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder for each run, and the table")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, metavar="NAME")
    parser.add_argument("--width", default="wide", choices=("wide", "thin"))
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--recipe", metavar="NAME", help="paper (default) or fast")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs; not for the peers")
    parser.add_argument("--peers", action="store_true", help="the RiR of naive layers too, eager and compiled")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after these")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    try:
        with joined(args.device) as (_, device):
            return _run_all(args, device)
    except COMMAND_ERRORS as error:
        say(f"error: {error}")
        return 2


def _run_all(args, device):
    out, runs = Path(args.out), plan(args)
    end = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    images = load(args.data).to(device)
    stopped = False
    for folder, label, given in runs:
        chosen = settings.from_arguments(given, on_gpu=device.type == "cuda")
        facts = _facts(out / folder)
        if facts:
            chosen = _continued(out / folder, facts, chosen)
            if state.finished(facts):
                continue
        left = (end - time.monotonic()) / 60
        if left <= 0:
            break
        say(f"\n{folder} ({label})")
        run = Run(chosen, images, out / folder, device=device)
        run.resume()
        stopped = carry_out(run, save_every=30, minutes=None if args.minutes is None else left)
        if stopped:
            break
    summarize(out, runs, device)
    return 130 if stopped else 0


def _facts(folder):
    """Of the run in the folder; None where there is none."""
    path = folder / CHECKPOINT
    return checkpoint.load_facts(path) if path.exists() else None


def _continued(folder, facts, chosen):
    """The run's own settings; SettingsError where they are not those asked for: the table compares runs alike."""
    try:
        return settings.continued(facts.get("settings"), chosen.flat())
    except SettingsError as error:
        raise SettingsError(f"{folder}: {error}") from error


def summarize(out: Path, runs, device) -> None:
    """results.json, table.md and curves.png of the finished runs among `runs`."""
    found = {}
    for folder, label, _ in runs:
        facts = _facts(out / folder)
        if facts and state.finished(facts):
            found.setdefault(label, []).append({"seconds": facts["seconds"], "records": facts["records"]})
    if not found:
        say(f"\nno run in {out} is finished yet: the same command goes on")
        return
    rows = [row(label, of_label) for label, of_label in found.items()]
    missing = len(runs) - sum(map(len, found.values()))
    save_json(
        out / "results.json",
        {
            "kind": "training",
            **provenance.of_a_run(device, "training"),
            "missing_runs": missing,
            "rows": rows,
        },
    )
    table = markdown(rows)
    (out / "table.md").write_text(table, encoding="utf-8")
    log.draw({label: of_label[0]["records"] for label, of_label in found.items()}, out / "curves.png")
    say(f"\n{table}\n{missing} runs are missing: the same command goes on" if missing else f"\n{table}")


def row(label: str, runs: list[dict]) -> dict:
    """Of one network's finished runs: accuracies in percent, seconds of training steps (medians over the runs)."""
    accuracies = [run["records"][-1]["test_accuracy"] for run in runs]
    return {
        "network": label,
        "seeds": len(runs),
        "epochs": len(runs[0]["records"]),
        "test_accuracy": accuracies,
        "mean": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "paper": PAPER.get(label),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "seconds_to": {
            str(percent): statistics.median(found)
            for percent in (80, 90, 92, 94)
            if None not in (found := [seconds_to(run["records"], percent) for run in runs])
        },
    }


def seconds_to(records: list[dict], percent: float) -> float | None:
    """Training time at the end of the first epoch with that test accuracy; None where there is none."""
    return next((record["seconds"] for record in records if record["test_accuracy"] >= percent), None)


def markdown(rows: list[dict]) -> str:
    """The table. A deviation is that of the seeds, over n - 1."""
    lines = [
        "| network | seeds | epochs | test accuracy, % | paper | seconds | to 90 % | to 94 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        spread = "" if found["spread"] is None else f" ± {found['spread']:.2f}"
        times = [f"{found['seconds_to'][key]:,.0f}" if key in found["seconds_to"] else "-" for key in ("90", "94")]
        cells = [
            found["network"],
            found["seeds"],
            found["epochs"],
            f"{found['mean']:.2f}{spread}",
            found["paper"] or "-",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, f"{found['seconds']:,.0f}", *times])) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
