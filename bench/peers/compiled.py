"""torch.compile at its best: of the merged form, for one shape, frozen for inference; CUDA graphs are the timer's."""

import torch
from torch import nn

MODES = {"compile": "default", "compile_max_autotune": "max-autotune-no-cudagraphs"}
IMPLS = tuple(MODES)


def convert(module: nn.Module, impl: str, *, training: bool) -> nn.Module:
    """The module, compiled at its first call."""
    return torch.compile(module, fullgraph=True, dynamic=False, options=options(impl, training=training))


def options(impl: str, *, training: bool) -> dict:
    """Inductor's options of that mode, with weights frozen for inference."""
    from torch._inductor import list_mode_options  # seconds of imports

    return list_mode_options(MODES[impl], dynamic=False) | ({} if training else {"freezing": True})


def forget() -> None:
    """Drops what was compiled for earlier shapes: torch would otherwise recompile for any shape, and then give up."""
    torch.compiler.reset()
