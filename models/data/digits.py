"""scikit-learn's digits: 1,797 handwritten ones of 8x8 pixels, inside its wheel."""

from dataclasses import replace

import numpy as np

from .images import Images, Jitter, assemble, choose

_TEST = 360  # a fifth
# as differently as people place, tilt and size what they write; a crop of 7 pixels of 8 would cut into it
_JITTER = Jitter(shift=0.5, turn=10, zoom=0.1)


def read(*, train_images, test_images, seed) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    x = np.round(found.images[:, None] * (255 / 16)).astype(np.uint8)  # they are 0..16
    y = found.target.astype(np.int64)
    # one split for all: accuracies of different seeds are of the same test images
    train, test = train_test_split(np.arange(len(x)), test_size=_TEST, stratify=y, random_state=0)
    train = train[choose(len(train), train_images, seed)]
    test = test[choose(len(test), test_images, seed)]
    names = [str(name) for name in found.target_names]
    images = assemble("scikit-learn's digits", names, (x[train], y[train]), (x[test], y[test]), flip=False)
    return replace(images, padding=0, jitter=_JITTER)
