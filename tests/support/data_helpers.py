"""What the tests of data sets share: images to write, and the check that a bad data set is refused."""

import numpy as np
import pytest

from models.data import DataError, load


def random_images(count, height=6, width=6, channels=3):
    """uint8 (count, height, width, channels), without the last where there is one."""
    shape = (count, height, width, channels) if channels > 1 else (count, height, width)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


def refused(source, *words, **how):
    """All of `words`, in this order, are in what load says."""
    with pytest.raises(DataError) as found:
        load(source, **how)
    message, place = str(found.value), 0
    for word in words:
        place = message.find(word, place)
        assert place >= 0, f"no {word!r} in this order in {message!r}"
