"""Images to train on: scikit-learn's digits, CIFAR as it is published, or a folder of one's own."""

from pathlib import Path

from . import binary, digits, folder, parquet
from .images import DataError, Images

__all__ = ["DataError", "Images", "load"]

_FORMS = (
    "a folder with train-*.parquet and test-*.parquet, CIFAR's binary version (packed or extracted), or a folder with "
    "train/<class>/ and test/<class>/ full of images"
)


def load(
    source: str | Path,
    *,
    train_images: int | None = None,
    test_images: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Images:
    """The images of `source`, in memory as uint8 (N, C, H, W) on the CPU, with int64 labels (N,).

    source: "digits", for those that scikit-learn brings, or a path, whose form is recognized by what lies there:
        - a folder with train-*.parquet and test-*.parquet in Hugging Face's schema: img or image = {bytes: an image
          file, path}, and label, or fine_label as CIFAR-100 has it (coarse_label is not read);
        - CIFAR-10 or CIFAR-100 in the binary version, as .tar.gz or extracted;
        - a folder with train/<class>/ and test/<class>/ (or val/<class>/), which hold images.
    train_images, test_images: at most so many of each part, drawn at random; only these are decoded. None: all.
    image_size: pixels; images in parquet files and folders are scaled and centre-cropped to a square of that side.
        It must be given where they are not all of one size.
    seed: chooses the images where fewer than all are asked for; the split into two parts never depends on it.

    DataError, a ValueError, for whatever is missing, damaged or of another form; it names the file.
    """
    for name, value in (("train_images", train_images), ("test_images", test_images), ("image_size", image_size)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, or None, got {value}")
    how = {"train_images": train_images, "test_images": test_images, "seed": seed}
    path = Path(source)
    if source == "digits":
        images = digits.read(**how)
    elif path.is_file():
        images = binary.read_archive(path, **how)
    elif not path.is_dir():
        raise DataError(f"{path} does not exist: give the path of {_FORMS}, or 'digits'")
    elif any(path.glob("*.parquet")):
        return parquet.read(path, image_size=image_size, **how)
    elif binary.recognized(path):
        images = binary.read_folder(path, **how)
    elif (path / "train").is_dir():
        return folder.read(path, image_size=image_size, **how)
    else:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing: it is empty"
        raise DataError(f"{path} is not {_FORMS}; in it is {found}")
    if image_size not in (None, images.train_x.shape[-1]):
        side = images.train_x.shape[-1]
        raise DataError(f"{images.name} has images of {side}x{side} pixels and is not scaled: image_size={image_size}")
    return images
