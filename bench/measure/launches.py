"""Which kernels of ours a call starts, with which configurations."""

import contextlib


@contextlib.contextmanager
def launches():
    """A list of {kernel, programs, tiles and warps}, filled while calls run as always; empty without Triton."""
    chosen = ("BLOCK", "BOX", "C_BLOCKS", "FOLD_2X2", "PIXEL_ORDER", "ROWS", "SKIP_PADDING", "num_")
    seen = []
    try:
        from rir_kernels.triton.launch.runtime import observed
    except ImportError:
        yield seen
        return

    def note(kernel, programs, options):
        config = {name: value for name, value in options.items() if name.startswith(chosen)}
        seen.append({"kernel": kernel.fn.__name__, "programs": programs, **config})

    with observed(note):
        yield seen
