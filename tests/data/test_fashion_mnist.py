"""Fashion-MNIST from small files of the true format, compressed or not, in both layouts."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fastjac import FastjacError
from fastjac.data import evaluation_transform, load_data
from fastjac.data.idx import read_idx

PARTS = {"train": 40, "t10k": 20}


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    return header + values.tobytes()


def write(root, compress):
    """The four files; their images by part."""
    root.mkdir(parents=True, exist_ok=True)
    rng, pixels = np.random.default_rng(0), {}
    for part, count in PARTS.items():
        pixels[part] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", pixels[part]), ("labels-idx1", labels)):
            data = idx(values)
            end = ".gz" if compress else ""
            (root / f"{part}-{name}-ubyte{end}").write_bytes(
                gzip.compress(data) if compress else data
            )
    return pixels


@pytest.mark.parametrize("compress", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw"])
def test_images(tmp_path, compress, inside):
    pixels = write(tmp_path / inside, compress)
    data = load_data("fashion-mnist", tmp_path)
    assert (len(data.train), len(data.test), data.channels, data.size) == (40, 20, 1, 32)
    image, label = data.train[13]
    assert label == 3
    assert data.classes[3] == "Dress"
    assert torch.allclose(
        image[0, 2:-2, 2:-2], torch.from_numpy(pixels["train"][13]) / 255, rtol=1e-6
    )
    assert not image[0, :2].any()
    assert not image[0, :, -2:].any()
    assert data.labels == [label for _, label in data.train]


def test_sizes_and_channels(tmp_path):
    write(tmp_path, True)
    large = load_data("fashion-mnist", tmp_path, size=64, channels=3)
    image, _ = large.test[0]
    assert image.shape == (3, 64, 64)
    assert torch.equal(image[0], image[2])
    assert len(large.mean) == len(large.std) == 3
    with pytest.raises(FastjacError, match=r"images of 1 channels, got --channels 2; expected 3"):
        load_data("fashion-mnist", tmp_path, channels=2)


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (48, 3)])
def test_an_image_as_the_test_images_are(tmp_path, size, channels):
    pixels = write(tmp_path, True)
    data = load_data("fashion-mnist", tmp_path, size=size, channels=channels, augment=True)
    image = Image.fromarray(pixels["t10k"][3]).convert("RGB")
    made = evaluation_transform("fashion-mnist", size, channels)(image)
    rounded = 1e-6 if size == 32 else 1.01 / 255  # the data set's are resized in 8 bits
    torch.testing.assert_close(made, data.test[3][0], rtol=0, atol=rounded)


def test_augmentation_moves_the_training_images_alone(tmp_path):
    write(tmp_path, True)
    plain = load_data("fashion-mnist", tmp_path)
    moved = load_data("fashion-mnist", tmp_path, augment=True)
    assert any(not torch.equal(moved.train[i][0], plain.train[i][0]) for i in range(4))
    assert torch.equal(moved.test[0][0], plain.test[0][0])


def test_hold_out(tmp_path):
    write(tmp_path, True)
    whole = load_data("fashion-mnist", tmp_path)
    data = load_data("fashion-mnist", tmp_path, validation=10, augment=True)
    assert (len(data.train), len(data.test)) == (30, 10)
    assert data.labels == [label for _, label in data.train]
    known = [image for image, _ in whole.train]
    held = [image for image, _ in data.test]
    # Plain training images; and the others are what is left to train on.
    assert all(any(torch.equal(h, k) for k in known) for h in held)
    assert sorted(data.train.indices + data.test.indices) == list(range(40))
    again = load_data("fashion-mnist", tmp_path, validation=10)
    assert again.test.indices == data.test.indices
    with pytest.raises(FastjacError, match="expected 1 to 39 to hold out, got 40"):
        load_data("fashion-mnist", tmp_path, validation=40)


DAMAGE = {
    "missing": (None, "t10k-images-idx3-ubyte.* is missing; expected the four IDX files"),
    "truncated gzip": (lambda b: b[: len(b) // 2], "is damaged: Compressed file ended"),
    "flipped bits": (lambda b: b[:-8] + bytes(8), "is damaged"),
    "empty": (lambda b: b"", "got an empty file"),
    "a web page": (lambda b: b"<!DOCTYPE html>", "is not an IDX file of unsigned bytes in 3"),
    "labels": (lambda b: gzip.compress(idx(np.zeros(20, np.uint8))), "begin with 00000803, got 0"),
    "fewer values": (
        lambda b: gzip.compress(gzip.decompress(b)[:-100]),
        "promises 15680 values, 15580 are there",
    ),
    "fewer images": (
        lambda b: gzip.compress(idx(np.zeros((19, 28, 28), np.uint8))),
        r"as many images of 28 x 28 as labels, got \[19, 28, 28\] and \[20\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged(tmp_path, damage):
    write(tmp_path, True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    change, expected = DAMAGE[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FastjacError, match=expected):
        load_data("fashion-mnist", tmp_path)


def test_label_out_of_range(tmp_path):
    write(tmp_path, False)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(FastjacError, match="expected labels from 0 to 9, got 10"):
        load_data("fashion-mnist", tmp_path)


def test_read_idx_of_one_dimension(tmp_path):
    (tmp_path / "x").write_bytes(idx(np.arange(7, dtype=np.uint8)))
    assert read_idx(tmp_path / "x", 1).tolist() == list(range(7))
