"""What a run leaves beside its checkpoints: run.json, curves.png, and a few lines on the screen."""

import math
import sys

import torch

from tooling import provenance
from tooling.files import save_json

from . import log

RUN, CURVES = "run.json", "curves.png"


def headline(run) -> str:
    """What is about to be trained."""
    parameters = sum(p.numel() for p in run.model.parameters())
    recipe, images = run.recipe, run.images
    shape = "x".join(map(str, images.train_x.shape[1:]))
    place = run.device if run.ranks.world == 1 else f"{run.ranks.world} ranks, {run.device.type}"
    settings = run.settings
    return (
        f"{settings.model}, {parameters:,} parameters, impl {settings.impl}, {settings.precision}, on {place}\n"
        f"{images.name}: {len(images.train_y):,} + {len(images.test_y):,} images {shape}\n"
        f"recipe {settings.recipe_name}: {recipe.epochs} epochs of {run.steps_per_epoch} steps of "
        f"{recipe.batch_size} images" + (f"; goes on at epoch {run.epoch + 1}" if run.epoch or run.step else "")
    )


def write(run) -> None:
    """run.json and, once an epoch is over, curves.png; OSError where they cannot be written."""
    save_json(
        run.out / RUN,
        {
            "kind": "training",
            "command": ["python -m models.train", *sys.argv[1:]],
            "settings": run.settings.as_dict(),
            "model": run.description | {"parameters": sum(p.numel() for p in run.model.parameters())},
            "data": run.data,
            "ranks": run.ranks.world,
            **provenance.of_a_run(run.device, "training"),
            "result": result(run),
        },
    )
    if run.records:
        log.draw({run.settings.model: run.records}, run.out / CURVES)


def result(run) -> dict:
    """Accuracies in percent, seconds of training steps alone."""
    epochs = len(run.records)
    images = (run.epoch * run.steps_per_epoch + run.step) * run.recipe.batch_size
    return {
        "finished": run.finished,
        "epochs": epochs,
        "test_accuracy": run.records[-1]["test_accuracy"] if epochs else None,
        "best_test_accuracy": max((r["test_accuracy"] for r in run.records), default=None),
        "seconds": round(run.seconds, 3),
        "images_per_second": round(images / run.seconds, 1) if run.seconds else None,
        "peak_memory_mib": _peak_memory(run.device),
    }


def closing(run) -> str:
    """The result in a line."""
    found = result(run)
    accuracy = found["test_accuracy"]
    wrong = "" if accuracy is None else f", {round(len(run.images.test_y) * (1 - accuracy / 100))} images wrong"
    shown = "no epoch finished" if accuracy is None else f"test accuracy {accuracy:.2f} %{wrong}"
    return (
        f"{shown}; {found['seconds']:,.1f} s in training steps, {found['images_per_second'] or math.nan:,.0f} images/s"
    )


def _peak_memory(device):
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.type == "cuda" else None
