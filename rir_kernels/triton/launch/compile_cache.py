"""Where Triton keeps what it has compiled, which it cannot do without: TRITON_CACHE_DIR, else in the home folder."""

import os
import tempfile
import warnings

from triton import knobs


def ensure_writable() -> None:
    """A folder of this process, with a warning, where the one that Triton would take cannot be written."""
    try:
        os.makedirs(knobs.cache.dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=knobs.cache.dir):
            return
    except OSError as error:
        found = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")  # nobody else may write there
        warnings.warn(
            f"compiled kernels cannot be kept ({error}): this process keeps its own in {found}; set TRITON_CACHE_DIR "
            "to a folder that lasts",
            RuntimeWarning,
            stacklevel=2,
        )
