"""Data sets: what is read is what was written, and what cannot be read says why. The files are written here."""

import io
import json
import os
import statistics
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from models.data import DataError, load
from tests.support.data_helpers import random_images, refused

CIFAR = Path(os.environ.get("CIFAR10_DIR", "CIFAR10_DIR, which is not set"))
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def encoded(image, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format)
    return file.getvalue()


def write_parquet(folder, split, files, labels, image="img", label="label", names=None, **more):
    """Hugging Face's schema. files: their bytes; more: further columns."""
    rows = [file if file is None else {"bytes": file, "path": None} for file in files]
    table = pyarrow.table({image: pyarrow.array(rows, STRUCT), label: pyarrow.array(labels, pyarrow.int64()), **more})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    name = folder / f"{split}-00000-of-00001.parquet"
    parquet.write_table(table, name)
    return name


def write_parts(folder, **how):
    """Four images for training, three for testing; both parts as (N, C, H, W)."""
    train, test = random_images(4), random_images(3)
    write_parquet(folder, "train", map(encoded, train), [3, 1, 4, 1], **how)
    write_parquet(folder, "test", map(encoded, test), [4, 0, 2], **how)
    return train.transpose(0, 3, 1, 2), test.transpose(0, 3, 1, 2)


# digits


def test_digits():
    images = load("digits")
    assert images.train_x.shape == (1437, 1, 8, 8)
    assert images.test_x.shape == (360, 1, 8, 8)
    assert images.classes == tuple("0123456789")
    assert (images.padding, images.flip, images.channels, images.num_classes) == (0, False, 1, 10)
    assert images.train_x.dtype == images.test_x.dtype == torch.uint8
    assert images.train_y.dtype == images.test_y.dtype == torch.long
    shares = images.train_y.bincount() / 1437 - images.test_y.bincount() / 360
    assert shares.abs().max() < 1 / 360  # stratified


def test_digits_are_scikit_learns_and_in_one_part_only():
    from sklearn.datasets import load_digits

    images, found = load("digits"), load_digits()
    x = torch.cat([images.train_x, images.test_x]).flatten(1)
    ours = sorted(zip(x.tolist(), torch.cat([images.train_y, images.test_y]).tolist(), strict=True))
    theirs = np.rint(found.data * 255 / 16).astype(int).tolist()
    assert ours == sorted(zip(theirs, found.target.tolist(), strict=True))


def test_the_split_of_the_digits_does_not_depend_on_seeds():
    first = load("digits")
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first.test_x, load("digits", seed=7).test_x)
    few = [load("digits", train_images=50, test_images=20, seed=seed) for seed in (0, 0, 1)]
    assert few[0].train_x.shape == (50, 1, 8, 8)
    assert torch.equal(few[0].train_x, few[1].train_x)
    assert not torch.equal(few[0].train_x, few[2].train_x)
    assert {tuple(x.flatten().tolist()) for x in few[0].test_x} <= {tuple(x.flatten().tolist()) for x in first.test_x}


def test_moments_are_exact():
    images = load("digits")
    values = images.train_x.flatten().tolist()
    assert images.mean.item() == statistics.mean(values)  # which computes with fractions
    assert images.std.item() == pytest.approx(statistics.pstdev(values), rel=1e-15)
    assert images.mean.dtype == images.std.dtype == torch.float64
    assert images.to("meta").test_y.device.type == "meta"


# parquet


def test_parquet(tmp_path):
    train, test = write_parts(tmp_path)
    images = load(str(tmp_path))
    assert torch.equal(images.train_x, torch.from_numpy(train))
    assert torch.equal(images.test_x, torch.from_numpy(test))
    assert images.train_y.tolist() == [3, 1, 4, 1]
    assert images.test_y.tolist() == [4, 0, 2]
    assert images.name == "CIFAR-10 (PNG)"
    assert images.classes[:2] == ("airplane", "automobile")
    assert (images.num_classes, images.flip, images.padding) == (10, True, 0)


def test_jpeg_is_what_pillow_decodes_and_is_named(tmp_path):
    files = [encoded(image, "JPEG") for image in random_images(3, 32, 32)]
    write_parquet(tmp_path, "train", files, [0, 1, 2])
    write_parquet(tmp_path, "test", files[:1], [3])
    images = load(tmp_path)
    expected = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]).transpose(0, 3, 1, 2)
    assert torch.equal(images.train_x, torch.from_numpy(expected))
    assert images.name == "CIFAR-10 (JPEG re-encoded)"
    assert images.padding == 4


def test_cifar100_has_its_fine_labels(tmp_path):
    train = random_images(2)
    for split in ("train", "test"):
        write_parquet(tmp_path, split, map(encoded, train), [99, 7], label="fine_label", coarse_label=[1, 2])
    images = load(tmp_path)
    assert images.train_y.tolist() == [99, 7]
    assert (images.name, images.num_classes) == ("CIFAR-100 (PNG)", 100)


def test_other_columns_and_names(tmp_path):
    write_parts(tmp_path, image="image", names=["a", "b", "c", "d", "e", "never seen"])
    images = load(tmp_path)
    assert images.classes == ("a", "b", "c", "d", "e", "never seen")
    assert images.name == f"{tmp_path.name} (PNG)"
    write_parts(tmp_path, image="image")
    assert load(tmp_path).classes == tuple("01234")


def test_grey_images_have_one_channel_unless_others_have_colours(tmp_path):
    grey, colours = random_images(2, channels=1), random_images(3)
    write_parquet(tmp_path, "train", map(encoded, grey), [0, 1], image="image")
    write_parquet(tmp_path, "test", map(encoded, grey), [0, 1], image="image")
    images = load(tmp_path)
    assert torch.equal(images.train_x, torch.from_numpy(grey[:, None]))
    assert not images.flip
    write_parquet(tmp_path, "test", map(encoded, colours), [0, 1, 1], image="image")
    images = load(tmp_path)
    assert torch.equal(images.train_x, torch.from_numpy(grey[:, None].repeat(3, 1)))
    assert images.flip


def test_several_files_and_many_rows(tmp_path):
    """More rows than are read at once, in two files: rows stay beside their labels, whichever are chosen."""
    files = [encoded(np.full((2, 2), value % 251, np.uint8)) for value in range(2500)]
    labels = [value % 251 for value in range(2500)]
    first = write_parquet(tmp_path, "train", files[:1025], labels[:1025], image="image")
    first.rename(tmp_path / "train-00000-of-00002.parquet")
    second = write_parquet(tmp_path, "train", files[1025:], labels[1025:], image="image")
    second.rename(tmp_path / "train-00001-of-00002.parquet")
    write_parquet(tmp_path, "test", files[:1], [0], image="image")
    for how in ({}, {"train_images": 700}, {"train_images": 1}):
        images = load(tmp_path, **how)
        assert len(images.train_y) == how.get("train_images", 2500)
        assert torch.equal(images.train_x[:, 0, 0, 0].long(), images.train_y)


def test_no_more_is_decoded_than_asked_for(tmp_path):
    good = [encoded(image) for image in random_images(1)]
    write_parquet(tmp_path, "train", [*good, b"broken"], [0, 1])
    write_parquet(tmp_path, "test", good, [0])
    outcomes = set()
    for seed in range(20):
        try:
            outcomes.add(tuple(load(tmp_path, train_images=1, seed=seed).train_y.tolist()))
        except DataError:
            outcomes.add("broken")
    assert outcomes == {(0,), "broken"}


def test_parquet_images_are_scaled_when_asked(tmp_path):
    write_parquet(tmp_path, "train", map(encoded, (*random_images(1), *random_images(1, 9, 12))), [0, 1])
    write_parquet(tmp_path, "test", [encoded(random_images(1, 5, 6)[0])], [1])
    refused(tmp_path, "train-00000-of-00001.parquet, row 1", "12x9 pixels", "6x6", "give image_size")
    assert load(tmp_path, image_size=4).train_x.shape == (2, 3, 4, 4)


def test_parts_of_unlike_sizes(tmp_path):
    write_parquet(tmp_path, "train", map(encoded, random_images(1)), [0])
    write_parquet(tmp_path, "test", map(encoded, random_images(1, 5, 7)), [0])
    refused(tmp_path, "unlike sizes", "6x6 and 7x5", "image_size")


def test_damaged_parquet(tmp_path):
    write_parts(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"
    content = file.read_bytes()
    for bad in (content[: len(content) // 2], b"", b"no parquet" * 9, b"\0" * 400 + content[400:]):
        file.write_bytes(bad)
        refused(tmp_path, str(file), "damaged or no parquet file", "fetch it again")


def test_parquet_without_a_part(tmp_path):
    write_parts(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    refused(tmp_path, str(tmp_path), "no test-*.parquet")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [1]}, ["no column img or image", "only label"]),
        ({"img": [1]}, ["no column label or fine_label", "only img"]),
        ({"img": [1], "label": [1]}, ["column img must be {bytes, path}", "not int64"]),
        ({"img": [{"bytes": "/etc/passwd"}], "label": [1]}, ["column img must be {bytes, path}", "bytes: string"]),
        ({"img": pyarrow.array([None], STRUCT), "label": ["cat"]}, ["column label must hold integers", "not string"]),
    ],
)
def test_missing_columns(tmp_path, columns, words):
    write_parts(tmp_path)
    parquet.write_table(pyarrow.table(columns), tmp_path / "train-00000-of-00001.parquet")
    refused(tmp_path, "train-00000-of-00001.parquet", *words)


def test_later_files_have_the_columns_of_the_first(tmp_path):
    write_parts(tmp_path)
    parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "test-00000-of-00001.parquet")
    refused(tmp_path, "test-00000-of-00001.parquet has no column img")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (None, ["row 1", "label is null"]),
        (-1, ["row 1", "label -1 is out of range", "0 to 9"]),
        (10, ["row 1", "label 10 is out of range", "0 to 9"]),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_labels(tmp_path, split, label, words):
    write_parts(tmp_path)
    write_parquet(tmp_path, split, map(encoded, random_images(2)), [0, label])
    refused(tmp_path, f"{split}-00000-of-00001.parquet", *words)


def test_labels_that_training_does_not_have(tmp_path):
    write_parts(tmp_path, image="image")
    write_parquet(tmp_path, "test", map(encoded, random_images(1)), [5], image="image")
    refused(tmp_path, "test-", "label 5 is out of range", "0 to 4")
    write_parquet(tmp_path, "train", map(encoded, random_images(1)), [10**12], image="image")
    refused(tmp_path, "train-", "label 1000000000000 is out of range")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"no image", ["is no image", "PNG"]),
        (b"", ["is no image"]),
        (encoded(random_images(1, 64, 64)[0])[:3000], ["cannot be decoded", "replace or remove it"]),
        (encoded(random_images(1, 64, 64)[0], "JPEG")[:1500], ["cannot be decoded"]),
        (encoded(random_images(1)[0], "EPS"), ["is no image"]),
        (encoded(np.zeros((6, 6), np.uint16)), ["more than 8 bits"]),
        (None, ["img has no bytes"]),
    ],
    ids=["text", "empty", "half a PNG", "half a JPEG", "EPS", "16 bits", "null"],
)
def test_undecodable_images(tmp_path, file, words):
    write_parts(tmp_path)
    write_parquet(tmp_path, "test", [encoded(random_images(1)[0]), file], [0, 1])
    refused(tmp_path, "test-00000-of-00001.parquet, row 1", *words)


def test_parquet_without_rows(tmp_path):
    write_parts(tmp_path)
    write_parquet(tmp_path, "test", [], [])
    refused(tmp_path, "test-00000-of-00001.parquet", "no rows", "no images")


# what is no data at all


def test_sources_that_are_nothing(tmp_path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist", "'digits'")
    refused(tmp_path, "it is empty")
    (tmp_path / "notes.txt").write_text("nothing")
    refused(tmp_path, "train-*.parquet", "binary version", "train/<class>/", "in it is notes.txt")
    refused(tmp_path / "notes.txt", "notes.txt", "damaged or no .tar.gz", "cifar-10-binary.tar.gz")


@pytest.mark.parametrize("name", ["train_images", "test_images", "image_size"])
def test_numbers_below_one(name):
    refused("digits", f"{name} must be at least 1", "got 0", **{name: 0})


def test_digits_are_not_scaled():
    assert load("digits", image_size=8).train_x.shape[-1] == 8
    refused("digits", "8x8 pixels", "image_size=32", image_size=32)


# the true CIFAR-10


@pytest.mark.long
@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"no {CIFAR}")
def test_cifar10_as_it_is():
    images = load(CIFAR)
    assert images.train_x.shape == (50_000, 3, 32, 32)
    assert images.test_x.shape == (10_000, 3, 32, 32)
    assert images.train_y.bincount().tolist() == [5000] * 10
    assert images.test_y.bincount().tolist() == [1000] * 10
    assert images.name == "CIFAR-10 (JPEG re-encoded)"
    # the moments of the original files, known from many trainings, in units of 1/255
    torch.testing.assert_close(images.mean / 255, torch.tensor([0.4914, 0.4822, 0.4465]).double(), rtol=0, atol=2e-3)
    torch.testing.assert_close(images.std / 255, torch.tensor([0.2470, 0.2435, 0.2616]).double(), rtol=0, atol=4e-3)
