"""Example inputs, as a user passes them."""

import torch


def as_inputs(name: str, inputs) -> tuple[torch.Tensor | None, ...]:
    """Returns a tensor or a tuple of them as forward's arguments; for anything else TypeError names the argument."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if not isinstance(inputs, tuple) or not all(x is None or isinstance(x, torch.Tensor) for x in inputs):
        got = type(inputs).__name__
        if isinstance(inputs, tuple):
            got = f"a tuple of {', '.join(type(x).__name__ for x in inputs)}"
        raise TypeError(f"{name} must be a tensor or a tuple of tensors, got {got}: pass forward's arguments, (x, ...)")
    return inputs
