"""Example inputs, as a user hands them over."""

import torch


def as_inputs(name: str, inputs) -> tuple[torch.Tensor | None, ...]:
    """A tensor or a tuple of them as forward's arguments; TypeError, naming the argument, for anything else."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if not isinstance(inputs, tuple) or not all(x is None or isinstance(x, torch.Tensor) for x in inputs):
        got = type(inputs).__name__
        if isinstance(inputs, tuple):
            got = f"a tuple of {', '.join(type(x).__name__ for x in inputs)}"
        raise TypeError(f"{name} must be a tensor or a tuple of tensors, got {got}: pass forward's arguments, (x, ...)")
    return inputs
