"""CIFAR-100 from a small archive in the true format: pickles in a tar, checked by md5."""

import functools
import hashlib
import io
import pickle
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from fastjac import FastjacError
from fastjac.data import load_data

FOLDER = "cifar-100-python"


@pytest.fixture
def serve():
    """Serves a folder over HTTP; returns its address."""
    servers = []

    def start(folder):
        handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def archive(tmp_path, monkeypatch, serve):
    """An archive of 20 + 10 images, its address and sums in place of the real ones; its pixels."""
    rng = np.random.default_rng(0)
    names = [f"class{k:02d}" for k in range(100)]
    contents, pixels = {"meta": {"fine_label_names": names}}, {}
    for part, count in (("train", 20), ("test", 10)):
        pixels[part] = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[part] = {
            "data": pixels[part],
            "fine_labels": list(range(count)),
            "coarse_labels": [0] * count,
            "filenames": [f"{i}.png" for i in range(count)],
        }
    path = tmp_path / "served" / "cifar-100-python.tar.gz"
    path.parent.mkdir()
    sums = {}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            data = pickle.dumps(content)
            sums[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(CIFAR100, "url", f"{serve(path.parent)}/{path.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    return path, pixels


def test_downloads_unpacks_and_reads(tmp_path, archive):
    root = tmp_path / "data"
    data = load_data("cifar100", root, download=True)
    assert (root / FOLDER / "train").is_file()
    for part, pixels in archive[1].items():
        items = data.train if part == "train" else data.test
        assert len(items) == len(pixels)
        for i, row in enumerate(pixels):
            image, label = items[i]
            assert label == i
            expected = torch.from_numpy(row).view(3, 32, 32) / 255
            torch.testing.assert_close(image, expected)
    assert list(data.labels) == list(range(20))
    assert data.classes[7] == "class07"
    assert (data.channels, data.size) == (3, 32)


def test_augmentation_moves_training_images_only(tmp_path, archive):
    data = load_data("cifar100", tmp_path / "data", download=True, augment=True)
    plain = load_data("cifar100", tmp_path / "data")
    torch.manual_seed(0)
    moved = torch.stack([data.train[3][0] for _ in range(8)])
    assert moved.shape == (8, 3, 32, 32)
    assert len({bytes(m.numpy().tobytes()) for m in moved}) > 4
    values = set(plain.train[3][0].unique().tolist()) | {0.0}
    assert set(moved.unique().tolist()) <= values
    assert torch.equal(data.test[3][0], plain.test[3][0])


def test_another_size(tmp_path, archive):
    data = load_data("cifar100", tmp_path / "data", download=True, size=16)
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 16, 16)
    assert data.size == 16


def test_missing(tmp_path, archive):
    with pytest.raises(FastjacError, match=r"data/cifar-100-python/train is missing; .*--download"):
        load_data("cifar100", tmp_path / "data")


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_corrupt(tmp_path, archive, file):
    load_data("cifar100", tmp_path, download=True)
    path = tmp_path / FOLDER / file
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    with pytest.raises(
        FastjacError, match=rf"{FOLDER}/{file} is corrupt: its md5 is \w+, expected"
    ):
        load_data("cifar100", tmp_path)
    path.unlink()
    with pytest.raises(FastjacError, match=rf"{FOLDER}/{file} is missing"):
        load_data("cifar100", tmp_path)


def test_download_that_fails(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", CIFAR100.url.replace("cifar", "nowhere"))
    with pytest.raises(FastjacError, match=r"nowhere\S* could not be fetched into .*404"):
        load_data("cifar100", tmp_path / "data", download=True)


def test_download_of_another_file(tmp_path, archive):
    archive[0].write_bytes(archive[0].read_bytes()[:-5])
    with pytest.raises(FastjacError, match="could not be fetched"):
        load_data("cifar100", tmp_path / "data", download=True)
