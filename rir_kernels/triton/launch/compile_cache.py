"""Triton's compile cache, which it requires: in TRITON_CACHE_DIR, else in the home folder."""

import os
import tempfile
import warnings

from triton import knobs


def ensure_writable() -> None:
    """Switches to a temporary folder of this process, with a warning, if Triton's cache folder is not writable."""
    try:
        os.makedirs(knobs.cache.dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=knobs.cache.dir):
            return
    except OSError as error:
        found = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")  # only this user may write there
        warnings.warn(
            f"compiled kernels cannot be kept ({error}): this process keeps its own in {found}; set TRITON_CACHE_DIR "
            "to a folder that lasts",
            RuntimeWarning,
            stacklevel=2,
        )
