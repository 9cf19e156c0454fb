"""A run as tensors and plain data, and back: the network, its average, the optimizer, the schedule, random numbers,
the place in the data and what has been counted of the current epoch. What comes back is bit for bit what was.
"""

import torch

from . import build, checkpoint
from .errors import CheckpointError

_SCHEDULE = ("last_epoch", "_step_count", "_last_lr")  # the rest of a scheduler follows from the settings


def gather(run) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts) of a Run, for checkpoint.save."""
    tensors = build.sectioned("model", run.model.state_dict())
    if run.average is not None:
        tensors |= build.sectioned("average", run.average.model.state_dict())
    for index, values in run.optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)
        }
    # between epochs, where it is zero, ranks need not come here together
    counted = {name: run.ranks.sum(count) for name, count in run.counted.items()} if run.step else run.counted
    tensors |= build.sectioned("counted", counted)
    tensors["random.cpu"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(run.device)
    facts = {"model": run.description, "settings": run.settings.as_dict(), "data": run.data, **_place(run)}
    return tensors, facts


def _place(run):
    """Where the run stands, as plain data."""
    schedule = run.schedule.state_dict()
    return {
        "position": {"epoch": run.epoch, "step": run.step},
        "records": run.records,
        "seconds": run.seconds,
        "groups": run.optimizer.state_dict()["param_groups"],
        "schedule": {name: schedule[name] for name in _SCHEDULE},
    }


def finished(facts: dict) -> bool:
    """Whether a checkpoint with these facts is that of a run with all of its epochs."""
    return facts["position"]["epoch"] == facts["settings"]["recipe"]["epochs"]


def restore(run, path) -> None:
    """Makes a new Run what the checkpoint at `path` was; CheckpointError, with nothing changed, where it cannot be."""
    outline, facts = checkpoint.load_outline(path)
    if _identity(facts.get("data")) != _identity(run.data):
        raise CheckpointError(f"{path} was trained on {facts.get('data')}, and these images are {run.data}")
    weights = {"model": run.model} | ({} if run.average is None else {"average": run.average.model})
    for part, model in weights.items():
        checkpoint.check_fits(path, model.state_dict(), build.section(outline, part))
    checkpoint.check_fits(path, run.counted, build.section(outline, "counted"))
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    found = {name: tensor for name, tensor in build.section(outline, "random").items() if name == "cpu"}
    checkpoint.check_fits(path, {"cpu": torch.get_rng_state()}, found)
    _check_place(path, run, facts)
    has_moved = facts["position"] != {"epoch": 0, "step": 0}
    _check_optimizer(path, parameters, build.section(outline, "optimizer"), run.recipe.momentum and has_moved)
    # all that was looked at so far are names and shapes: only now is memory taken
    tensors, _ = checkpoint.load(path)
    groups = [{**group, "params": list(group["params"])} for group in facts["groups"]]
    state = _optimizer_state(parameters, build.section(tensors, "optimizer"))

    for part, model in weights.items():
        model.load_state_dict(build.section(tensors, part))
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    run.schedule.load_state_dict(facts["schedule"])
    if run.ranks.first:  # of all ranks together
        for name, tensor in build.section(tensors, "counted").items():
            run.counted[name].copy_(tensor)
    run.epoch, run.step = facts["position"]["epoch"], facts["position"]["step"]
    run.records, run.seconds = facts["records"], facts["seconds"]
    torch.set_rng_state(tensors["random.cpu"])
    if run.device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], run.device)


def _identity(data):
    """Of a fingerprint, what the images are: their folder may have been moved."""
    return {key: value for key, value in data.items() if key != "name"} if isinstance(data, dict) else data


def _check_optimizer(path, parameters, outline, has_momentum):
    missing = [i for i in range(len(parameters)) if has_momentum and f"{i}.momentum_buffer" not in outline]
    if missing:
        raise CheckpointError(
            f"{path} is damaged: it has no momentum for {len(missing)} of {len(parameters)} parameters"
        )
    for name, tensor in outline.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)] if index.isdecimal() and int(index) < len(parameters) else None
        if parameter is None or not key or parameter.shape != tensor.shape:
            raise CheckpointError(f"{path} is a checkpoint of another model: its {name} fits no parameter")


def _check_place(path, run, facts):
    for name, own in _place(run).items():
        alike = isinstance(facts.get(name), list) if name == "records" else _alike(facts.get(name), own)
        if not alike:
            raise CheckpointError(f"{path} does not say where its run stood: its {name} is missing or damaged")
    epoch, step, lines = facts["position"]["epoch"], facts["position"]["step"], len(facts["records"])
    if not (epoch in range(run.recipe.epochs + 1) and step in range(run.steps_per_epoch) and lines == epoch):
        raise CheckpointError(
            f"{path} stood at step {step} of epoch {epoch} with {lines} records, and its run has "
            f"{run.recipe.epochs} epochs of {run.steps_per_epoch} steps"
        )


def _alike(found, own):
    """Whether plain data has the keys, lengths and types of `own`; JSON knows lists and numbers of one kind only."""
    if isinstance(own, dict):
        return isinstance(found, dict) and found.keys() == own.keys() and all(_alike(found[k], own[k]) for k in own)
    if isinstance(own, list | tuple):
        return isinstance(found, list) and len(found) == len(own) and all(map(_alike, found, own))
    if isinstance(own, int | float) and not isinstance(own, bool):
        return isinstance(found, int | float) and not isinstance(found, bool)
    return type(found) is type(own)


def _optimizer_state(parameters, tensors):
    state = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        # fused updates walk through memory: a buffer has to lie as its parameter does
        state.setdefault(int(index), {})[key] = torch.empty_like(parameters[int(index)]).copy_(tensor)
    return state
