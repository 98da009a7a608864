"""Images without labels beside a data set: read as its own are, after them, of label -1."""

import numpy
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from test_fashion_mnist import write

from fastjac import FastjacError
from fastjac.data import add_unlabelled, load_data
from fastjac.errors import notice


@pytest.fixture
def extra(tmp_path, caplog):
    """Three digits as files, in a folder and below, among what is none."""
    notice.cache_clear()
    folder = tmp_path / "extra"
    (folder / "more" / ".thumbnails").mkdir(parents=True)
    for name, pixels in zip(("b.PNG", "a.png", "more/c.png"), load_digits().images, strict=False):
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(folder / name)
    (folder / "more" / ".thumbnails" / "c.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    return folder


def test_digits(extra, caplog):
    plain = load_data("digits")
    data = add_unlabelled(plain, extra)
    count = len(plain.labels)
    assert data.labels == [*plain.labels, -1, -1, -1]
    assert len(data.train) == count + 3
    assert isinstance(data.train[0][1], int)
    assert torch.equal(data.train[5][0], plain.train[5][0])
    wanted = torch.tensor(load_digits().images[:3], dtype=torch.float32)[:, None] / 16
    wanted = torch.nn.functional.interpolate(wanted, size=(16, 16), mode="bilinear")
    for item, source in ((count, 1), (count + 1, 0), (count + 2, 2)):  # a.png, b.PNG, more/c.png
        image, label = data.train[item]
        assert label == -1
        assert torch.allclose(image[0], wanted[source][0], atol=2 / 255)
    assert f"{extra}: 1 hidden files and folders skipped, such as more/.thumbnails" in caplog.text
    assert "1 files whose names do not end as images do skipped, such as notes.txt" in caplog.text
    three = add_unlabelled(load_data("digits", channels=3), extra)
    assert torch.equal(three.train[count][0], data.train[count][0].expand(3, -1, -1))


@pytest.mark.parametrize("move", [{}, {"augment": True}, {"flip": True}])
def test_as_those_of_the_data_set(extra, tmp_path, move):
    """The data set's own images, saved as files, come back as they do from it."""
    pixels = write(tmp_path / "idx", compress=False)["train"][:2]
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "extra" / f"{number}.png")
    data = add_unlabelled(load_data("fashion-mnist", tmp_path / "idx", **move), extra)
    for own, added in ((0, 40), (1, 41)):
        for seed in range(4):
            images = []
            for item in (own, added):
                torch.manual_seed(seed)
                images.append(data.train[item][0])
            assert torch.allclose(*images, atol=1e-6)
    wide = Image.fromarray(numpy.hstack([pixels[0][:, :14], pixels[0], pixels[0][:, 14:]]))
    wide.convert("RGB").save(extra / "0.png")  # of which the middle square is taken
    torch.manual_seed(0)
    wanted = data.train[0][0]
    torch.manual_seed(0)
    assert torch.allclose(data.train[40][0], wanted, atol=2 / 255)


@pytest.mark.parametrize("move", [{}, {"augment": True}, {"flip": True}])
def test_photographs(extra, tmp_path, move):
    noise = Image.effect_noise((50, 40), 90).convert("RGB")
    for path in (tmp_path / "train" / "k", tmp_path / "val" / "k", extra):
        path.mkdir(parents=True, exist_ok=True)
        noise.save(path / "0.png")
    data = add_unlabelled(load_data("folder", tmp_path, 16, **move), extra)
    assert list(data.labels) == [0, -1, -1, -1, -1]
    for seed in range(4):
        images = []
        for item in (0, 1):
            torch.manual_seed(seed)
            images.append(data.train[item][0])
        assert images[0].shape == (3, 16, 16)
        assert torch.equal(*images)


def test_damaged_and_empty(extra, tmp_path, caplog):
    data = load_data("digits")
    (extra / "a.png").write_bytes(b"no image")
    with pytest.raises(FastjacError, match=r"extra/a.png is not a readable image"):
        add_unlabelled(data, extra).train[len(data.labels)]
    assert len(add_unlabelled(data, extra, skip_damaged=True).labels) == len(data.labels) + 2
    assert "1 of 3 images left out; " in caplog.text
    for name in ("b.PNG", "more/c.png"):
        (extra / name).unlink()
    for skip in (True, False):
        if not skip:
            (extra / "a.png").unlink()
        with pytest.raises(FastjacError, match=r"extra has no image; images end in \.jpg"):
            add_unlabelled(data, extra, skip)


def test_a_link_back_is_not_followed(extra, tmp_path):
    (extra / "more" / "back").symlink_to(extra, target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    (extra / "a.png").rename(tmp_path / "elsewhere" / "a.png")
    (extra / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    data = load_data("digits")
    assert add_unlabelled(data, extra).labels[len(data.labels) :] == [-1, -1, -1]
