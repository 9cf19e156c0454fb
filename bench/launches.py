"""Which kernels of ours a call starts, with which configurations."""

import contextlib


@contextlib.contextmanager
def launches():
    """A list of {kernel, programs, tiles and warps}, filled while calls run as always; empty without Triton."""
    seen = []
    try:
        from rir_kernels.triton.launch.runtime import intercepted
    except ImportError:
        yield seen
        return

    def record(kernel, programs, *args, **options):
        chosen = {name: value for name, value in options.items() if name.startswith(("BLOCK", "BOX", "WALK", "num_"))}
        seen.append({"kernel": kernel.fn.__name__, "programs": programs, **chosen})
        kernel[(programs,)](*args, **options)

    with intercepted(record):
        yield seen
