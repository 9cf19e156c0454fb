"""Data sets in CIFAR's binary version and in folders of images, written by the tests themselves."""

import gzip
import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import binary, load
from tests.support.data_helpers import random_images, refused

# CIFAR's binary version


def records(*labels, seed=0):
    """One record for each: a label, or a coarse and a fine one; and its pixels as (3, 32, 32)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    return b"".join(bytes(label) + x.tobytes() for label, x in zip(labels, pixels, strict=True)), pixels


def write_cifar10(folder):
    """Two images in each file for training, three for testing; the pixels of both parts."""
    place = folder / "cifar-10-batches-bin"
    place.mkdir()
    parts = []
    for i in range(1, 6):
        content, pixels = records([i], [i - 1], seed=i)
        (place / f"data_batch_{i}.bin").write_bytes(content)
        parts.append(pixels)
    content, test = records([9], [0], [5], seed=6)
    (place / "test_batch.bin").write_bytes(content)
    (place / "readme.html").write_text("to be ignored")
    return place, np.concatenate(parts), test


def write_cifar100(folder):
    place = folder / "cifar-100-binary"
    place.mkdir()
    train, test = records([19, 99], [0, 3], seed=1), records([7, 50], seed=2)
    (place / "train.bin").write_bytes(train[0])
    (place / "test.bin").write_bytes(test[0])
    (place / "fine_label_names.txt").write_text("".join(f"class_{i}\n" for i in range(100)) + "\n")
    return place, train[1], test[1]


def pack(folder, mode="w:gz"):
    file = folder.parent / "archive.tar.gz"
    with tarfile.open(file, mode) as tar:
        tar.add(folder, folder.name)
    return file


@pytest.mark.parametrize("form", ["packed", "tar", "extracted", "around"])
def test_cifar10(tmp_path, form):
    place, train, test = write_cifar10(tmp_path)
    if form in ("packed", "tar"):
        source = pack(place, "w:gz" if form == "packed" else "w")
        shutil.rmtree(place)
    else:
        source = place if form == "extracted" else tmp_path
    images = load(source)
    assert torch.equal(images.train_x, torch.from_numpy(train))
    assert torch.equal(images.test_x, torch.from_numpy(test))
    assert images.train_y.tolist() == [1, 0, 2, 1, 3, 2, 4, 3, 5, 4]
    assert images.test_y.tolist() == [9, 0, 5]
    assert images.name == "CIFAR-10 (binary version)"
    assert images.classes[9] == "truck"
    assert (images.padding, images.flip) == (4, True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [source.name if source.is_file() else place.name]


@pytest.mark.parametrize("packed", [False, True])
def test_cifar100(tmp_path, packed):
    place, train, test = write_cifar100(tmp_path)
    images = load(pack(place) if packed else place)
    assert torch.equal(images.train_x, torch.from_numpy(train))
    assert torch.equal(images.test_x, torch.from_numpy(test))
    assert images.train_y.tolist() == [99, 3]
    assert images.test_y.tolist() == [50]
    assert (images.classes[99], images.num_classes) == ("class_99", 100)


def test_some_of_cifar10(tmp_path):
    place, train, _ = write_cifar10(tmp_path)
    images = load(place, train_images=4, test_images=1)
    rows = [next(i for i, x in enumerate(train) if np.array_equal(x, found)) for found in images.train_x.numpy()]
    assert rows == sorted(set(rows))
    assert images.train_y.tolist() == [[1, 0, 2, 1, 3, 2, 4, 3, 5, 4][row] for row in rows]
    assert len(images.test_y) == 1
    refused(place, "32x32 pixels", "image_size=64", image_size=64)


def test_truncated_files(tmp_path):
    place, _, _ = write_cifar10(tmp_path)
    for count in (3072, 6145, 0):
        (place / "data_batch_3.bin").write_bytes(b"\1" * count)
        words = ["data_batch_3.bin", f"{count} bytes", "3073-byte records", "fetch it again"]
        refused(place, str(place), *words)
        refused(pack(place), "archive.tar.gz", *words)
    (place / "data_batch_3.bin").unlink()
    refused(place, "no data_batch_3.bin", "not complete")
    refused(pack(place), "no data_batch_3.bin", "not complete")


def test_labels_out_of_range(tmp_path):
    place, _, _ = write_cifar10(tmp_path)
    (place / "test_batch.bin").write_bytes(records([3], [10])[0])
    refused(place, "test_batch.bin, record 1: label 10 is out of range", "0 to 9")
    place, _, _ = write_cifar100(tmp_path)
    (place / "train.bin").write_bytes(records([0, 100])[0])
    refused(pack(place), "train.bin, record 0: label 100 is out of range", "0 to 99")
    (place / "fine_label_names.txt").write_text("apple\n")
    refused(place, "fine_label_names.txt has 1 names, expected 100")


def test_oversized_files(tmp_path, monkeypatch):
    place, _, _ = write_cifar10(tmp_path)
    monkeypatch.setattr(binary, "_MOST_IMAGES", 2)
    refused(place, "test_batch.bin is oversized")  # it has three
    refused(pack(place), "test_batch.bin is oversized")


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(binary, "_LARGEST_ARCHIVE", 1 << 20)
    (bomb := tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(b"\0" * (2 << 20)))
    refused(bomb, "bomb.tar.gz", "more than 1 MiB")


def test_damaged_archives(tmp_path):
    place, _, _ = write_cifar10(tmp_path)
    file = pack(place)
    content = file.read_bytes()
    plain = gzip.decompress(content)
    for bad in (
        content[: len(content) // 2],
        content[:1000] + b"\0" * 1000 + content[2000:],
        gzip.compress(plain[:20_000]),
        b"",
        b"\x1f\x8b",
    ):
        file.write_bytes(bad)
        refused(file, str(file), "damaged or no .tar.gz", "fetch it again")


def member(name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, io.BytesIO(content)


def test_hostile_members(tmp_path):
    """Links are not followed, names are not paths, and nothing is there twice."""
    secret = tmp_path / "secret"
    secret.write_bytes(records([1])[0])
    good = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
    content, _ = records([1])
    link = member("cifar-10-batches-bin/test_batch.bin", type=tarfile.SYMTYPE, linkname=str(secret))
    twice = member(good[0], content)
    elsewhere = member("cifar-10-batches-bin/../test_batch.bin", content)
    for bad, words in ((link, ["no plain file"]), (twice, ["there twice"]), (elsewhere, ["has no test_batch.bin"])):
        with tarfile.open(tmp_path / "hostile.tar.gz", "w:gz") as tar:
            for entry in (*(member(name, content) for name in good), bad):
                tar.addfile(*entry)
        refused(tmp_path / "hostile.tar.gz", "hostile.tar.gz", *words)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.tar.gz", "secret"]


def test_archives_of_other_things(tmp_path):
    (tmp_path / "other").mkdir()
    refused(pack(tmp_path / "other"), "holds neither cifar-10-batches-bin nor cifar-100-binary")


class Trap:
    """Unpickled, it makes itself known."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize(("folder", "file"), [("cifar-10-batches-py", "data_batch_1"), ("cifar-100-python", "train")])
def test_pickles_are_refused_unopened(tmp_path, folder, file):
    (place := tmp_path / folder).mkdir()
    (place / file).write_bytes(pickle.dumps(Trap()))
    for source in (pack(place), place, tmp_path):
        refused(source, "pickle", "take the binary version")
    assert not Trap.sprung


def test_two_data_sets_in_a_folder(tmp_path):
    write_cifar10(tmp_path)
    write_cifar100(tmp_path)
    refused(tmp_path, "both CIFAR-10 and CIFAR-100", "path of one")


# folders of images


def write_folder(root, test="test", height=8, width=8, suffixes=("png", "PNG", "bmp")):
    """root/train/{cat,dog} with three and two images, root/<test>/dog with one; the dogs."""
    images = iter(random_images(6, height, width))
    for place, count in (("train/cat", 3), ("train/dog", 2), (f"{test}/dog", 1)):
        (root / place).mkdir(parents=True)
        for i in range(count):
            image = next(images)
            Image.fromarray(image).save(root / place / f"{i}.{suffixes[i]}")
    (root / "train" / "cat" / "notes.txt").write_text("to be ignored")
    (root / "train" / ".thumbnails").mkdir()
    return random_images(6, height, width).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder(tmp_path, test):
    pixels = write_folder(tmp_path, test)
    images = load(tmp_path)
    assert torch.equal(images.train_x, torch.from_numpy(pixels[:5]))
    assert torch.equal(images.test_x, torch.from_numpy(pixels[5:]))
    assert images.train_y.tolist() == [0, 0, 0, 1, 1]
    assert images.test_y.tolist() == [1]
    assert images.classes == ("cat", "dog")
    assert images.name == f"the folder {tmp_path.name}"
    assert (images.padding, images.flip) == (1, True)


def test_folder_scaled_and_cropped(tmp_path):
    """Twice as wide as high, and four times too large: scaled to 16x8, of which the middle is left."""
    write_folder(tmp_path)
    image = Image.fromarray(random_images(1, 32, 64)[0])
    image.save(tmp_path / "train" / "cat" / "0.png")
    refused(tmp_path, "cat/1.PNG has 8x8 pixels", "64x32", "image_size")
    images = load(tmp_path, image_size=8)
    assert images.train_x.shape == (5, 3, 8, 8)
    expected = np.array(image.resize((16, 8), Image.Resampling.BICUBIC).crop((4, 0, 12, 8)))
    assert torch.equal(images.train_x[0], torch.from_numpy(expected.transpose(2, 0, 1)))
    assert images.padding == 1


def test_large_files_are_decoded_in_order(tmp_path):
    """So many that threads take turns."""
    write_folder(tmp_path)
    for i in range(60):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "train" / "dog" / f"many{i:02}.png")
    images = load(tmp_path)
    assert images.train_x[5:, 0, 0, 0].tolist() == list(range(60))


def test_some_of_a_folder(tmp_path):
    write_folder(tmp_path)
    kept = load(tmp_path, train_images=1, seed=0)
    assert kept.train_x.shape == (1, 3, 8, 8)
    assert kept.num_classes == 2
    assert len({load(tmp_path, train_images=1, seed=seed).train_x.sum().item() for seed in range(10)}) > 1


def test_folder_without_a_test_part(tmp_path):
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / "test")
    refused(tmp_path, str(tmp_path), "no test part", "test or val")


def test_unknown_classes(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    refused(tmp_path, "test/wolf is of no class", "rename or remove")


def test_folders_without_images(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    refused(tmp_path, "train/bird holds no images", ".png", "add some or remove it")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    refused(tmp_path, "train holds no folders", "one for each class")


def test_an_image_that_is_none(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test" / "dog" / "0.png").write_text("no image")
    refused(tmp_path, "test/dog/0.png is no image")
