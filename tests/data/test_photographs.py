"""MIT Indoor 67 by its lists, and folders of images, from small trees in their formats."""

import pytest
import torch
from PIL import Image

from fastjac import FastjacError
from fastjac.data import load_data

COLOURS = {"bar": (200, 0, 0), "kitchen": (0, 200, 0), "airport_inside": (0, 0, 200)}


def save(path, colour, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).convert(mode).save(path)


@pytest.fixture
def mit67(tmp_path):
    """Three classes, two images each to train on and one to test, one that no list names."""
    lists = {"Train": [], "Test": []}
    for name, colour in COLOURS.items():
        for i, part in enumerate(("Train", "Train", "Test")):
            save(tmp_path / "Images" / name / f"{i}.jpg", colour)
            lists[part].append(f"{name}/{i}.jpg")
        save(tmp_path / "Images" / name / "unlisted.jpg", (9, 9, 9))
    for part, lines in lists.items():
        (tmp_path / f"{part}Images.txt").write_text("\n".join(lines) + "\n\n")
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for name, colour in COLOURS.items():
            save(tmp_path / part / name / "a.png", colour)
    return tmp_path


def check_colours(items, classes, count):
    assert len(items) == count
    for image, label in (items[i] for i in range(count)):
        assert image.shape == (3, 21, 21)
        assert image.dtype == torch.float32
        expected = torch.tensor(COLOURS[classes[label]]) / 255
        assert (image - expected.view(3, 1, 1)).abs().max() < 0.02


@pytest.mark.parametrize("augment", [False, True])
def test_mit67(mit67, augment):
    data = load_data("mit67", mit67, size=21, augment=augment)
    assert data.classes == sorted(COLOURS)
    check_colours(data.train, data.classes, 6)
    check_colours(data.test, data.classes, 3)
    assert sorted(data.labels) == [0, 0, 1, 1, 2, 2]
    assert [data.train[i][1] for i in range(6)] == list(data.labels)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_rgb(mit67, mode):
    save(mit67 / "Images" / "bar" / "0.jpg", (200, 200, 200), mode)
    data = load_data("mit67", mit67, size=21)
    image, _ = data.train[list(data.labels).index(data.classes.index("bar"))]
    assert (image - 200 / 255).abs().max() < 0.05


def test_default_size_and_crop(mit67):
    data = load_data("mit67", mit67)
    assert data.size == 224
    assert data.test[0][0].shape == (3, 224, 224)


def test_crops_flip(folder):
    """Left half red, right half blue: augmented images have it both ways round."""
    path = folder / "train" / "bar" / "a.png"
    image = Image.new("RGB", (40, 30), (200, 0, 0))
    image.paste((0, 0, 200), (20, 0, 40, 30))
    image.save(path)
    data = load_data("folder", folder, size=21, augment=True)
    torch.manual_seed(0)
    crops = [data.train[1][0] for _ in range(30)]
    redder = [(c[0, :, 0] - c[0, :, -1]).mean() for c in crops]
    assert min(redder) < -0.5
    assert max(redder) > 0.5


def test_folder(folder):
    data = load_data("folder", folder, size=21)
    assert list(data.classes) == sorted(COLOURS)
    check_colours(data.train, data.classes, 3)
    check_colours(data.test, data.classes, 3)


def fails(message, name, root):
    with pytest.raises(FastjacError, match=message):
        load_data(name, root, size=21)


def test_mit67_bad_lists(mit67):
    train, test = mit67 / "TrainImages.txt", mit67 / "TestImages.txt"
    good = train.read_text()
    train.write_text(good + "bar/9.jpg\n")
    fails(r"TrainImages.txt, line 8: names .*Images/bar/9.jpg, which is missing", "mit67", mit67)
    train.write_text("0.jpg\n" + good)
    fails("TrainImages.txt, line 1: expected class/file.jpg, got '0.jpg'", "mit67", mit67)
    train.write_text("\n")
    fails("TrainImages.txt is empty", "mit67", mit67)
    train.write_text("bar/0.jpg\nkitchen/0.jpg\n")
    fails("1 classes that .*TrainImages.txt has not, such as 'airport_inside'", "mit67", mit67)
    train.write_text(good)
    test.unlink()
    fails("TestImages.txt is missing; expected the official list", "mit67", mit67)


def test_folder_that_is_not_one(folder):
    (folder / "val" / "bar" / "a.png").unlink()
    fails("no valid file for the classes bar", "folder", folder)
    (folder / "val" / "bar").rmdir()
    fails("train has 1 classes that .*val has not, such as 'bar'", "folder", folder)
    for path in sorted((folder / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    fails("any class folder in .*val", "folder", folder)
    (folder / "val").rmdir()
    fails("folder: .*val is missing; expected", "folder", folder)


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_corrupt_image(folder, content):
    path = folder / "train" / "bar" / "a.png"
    path.write_bytes(path.read_bytes()[:60] if content == "cut" else content)
    data = load_data("folder", folder, size=21)
    with pytest.raises(FastjacError, match=r"train/bar/a.png is not a readable image"):
        data.train[1]
