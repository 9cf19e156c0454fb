"""Image files to arrays, by Pillow."""

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from .images import DataError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no others: EPS, for one, would start a program
_GREY = {"1": "L", "L": "L", "LA": "L"}
_ROUND = 1024  # images that are held undecoded
_LARGE = 16384  # bytes


def decode(files, image_size: int | None) -> tuple[np.ndarray, set[str]]:
    """uint8 (N, C, H, W), C being 1 where all images are grey and else 3; and the formats that were met.

    files: an iterable of (name for errors, bytes or path of an image file). image_size: as in models.data.load.
    """
    files, pixels, formats = iter(files), [], set()
    with ThreadPoolExecutor() as pool:
        while now := list(islice(files, _ROUND)):
            # Pillow lets go of Python's lock only inside a codec: with CIFAR's images threads wait for each other
            small = all(isinstance(file, bytes) and len(file) < _LARGE for _, file in now)
            decoded = (map if small else pool.map)(lambda file: _decode(*file, image_size), now)
            for (name, _), (image, format) in zip(now, decoded, strict=True):
                formats.add(format)
                pixels.append(image)
                if image.shape[:2] != pixels[0].shape[:2]:
                    sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, pixels[0].shape)]
                    raise DataError(f"{name} has {sizes[0]} pixels, the first image {sizes[1]}: give image_size")
    channels = max(image.shape[2] for image in pixels)
    stacked = np.empty((len(pixels), channels, *pixels[0].shape[:2]), np.uint8)
    for to, image in zip(stacked, pixels, strict=True):
        to[:] = image.transpose(2, 0, 1)  # a grey one goes into every channel
    return stacked, formats


def _decode(name: str, file: bytes | Path, image_size):
    """(uint8 (H, W, 1 or 3), format)"""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise DataError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8")
            format = image.format
            image = image.convert(_GREY.get(image.mode, "RGB"))
        if image_size:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is no image: it must be one of {', '.join(FORMATS)}") from error
    except Exception as error:  # what a decoder raises for garbage is anything: struct.error, SyntaxError, IndexError
        raise DataError(f"{name} cannot be decoded, {error}: replace or remove it") from error
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), format
