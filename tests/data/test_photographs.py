"""MIT Indoor 67 by its lists, and folders of images, from small trees in their formats."""

import numpy
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
    fails("folder: class 'bar': .*val/bar has no image; images end in .jpg", "folder", folder)
    (folder / "val" / "bar").rmdir()
    fails("train has 1 classes that .*val has not, such as 'bar'", "folder", folder)
    for path in sorted((folder / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    fails("folder: .*val has no folder of a class", "folder", folder)
    (folder / "val").rmdir()
    fails("folder: .*val is missing; expected", "folder", folder)


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_corrupt_image(folder, content):
    path = folder / "train" / "bar" / "a.png"
    path.write_bytes(path.read_bytes()[:60] if content == "cut" else content)
    data = load_data("folder", folder, size=21)
    with pytest.raises(FastjacError, match=r"train/bar/a.png is not a readable image"):
        data.train[1]


RAMP = numpy.linspace(0, 1, 64)[None].repeat(64, 0)
GREY = Image.fromarray((RAMP * 255).astype("uint8"))
DEEP = Image.fromarray((RAMP * 65535).astype("uint16"))


def palette_with_transparency():
    image = GREY.convert("RGB").quantize(256)
    image.info["transparency"] = bytes(range(256))
    return image


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("16.png", DEEP),
        ("16.tif", DEEP),
        ("16big.tif", Image.frombytes("I;16B", (64, 64), (RAMP * 65535).astype(">u2").tobytes())),
        ("16.pgm", DEEP),
        ("32.tif", Image.fromarray((RAMP * 65535).astype("int32"))),
        ("float.tif", Image.fromarray(RAMP.astype("float32"))),
        ("L.png", GREY),
        ("LA.png", GREY.convert("LA")),
        ("RGBA.webp", GREY.convert("RGBA")),
        ("P.png", GREY.convert("P")),
        ("P-alpha.png", palette_with_transparency()),
        ("CMYK.jpg", GREY.convert("RGB").convert("CMYK")),
        ("YCbCr.jpg", GREY.convert("YCbCr")),
        ("dither.png", GREY.convert("1")),
    ],
)
def test_a_ramp_stays_a_ramp(folder, name, image, recwarn):
    path = folder / "train" / "bar" / name
    image.save(path)
    data = load_data("folder", folder, size=56)
    item = next(i for i, (file, _) in enumerate(data.train.samples) if file == path)
    pixels = data.train[item][0]
    wanted = torch.linspace(0, 1, 64)[4:60]
    error = pixels.mean((0, 1)) - wanted  # per column: dithering is right on average
    assert error.abs().max() < (0.2 if name == "dither.png" else 0.03)
    assert not [w for w in recwarn if "PIL" in w.filename]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray((RAMP * 300).astype("float32")), r"mode F\) are from 0.0 to 300.0, ex"),
        (Image.fromarray(numpy.full((9, 9), numpy.nan, "float32")), "are from nan to nan, exp"),
        (Image.fromarray((RAMP * 99999).astype("int32")), "from 0 to 99999, expected 0 to 65535"),
        (Image.fromarray((RAMP * -9).astype("int32")), r"from -9 to 0, .*; save it rescaled"),
    ],
)
def test_pixels_of_no_known_range(folder, image, message):
    path = folder / "train" / "bar" / "a.tif"
    image.save(path)
    (folder / "train" / "bar" / "a.png").unlink()
    with pytest.raises(FastjacError, match=rf"bar/a.tif is not a readable image: .*{message}"):
        load_data("folder", folder, size=21).train[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photographs_are_turned_upright(folder, orientation, suffix):
    """By the definition: where row 0 and column 0 of the file lie in the picture."""
    row0, column0 = [
        ("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
        ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom"),
    ][orientation - 1]  # fmt: skip
    upright = numpy.zeros((64, 64), "uint8")
    upright[:32, :32] = 200  # top left
    upright[:32, 32:] = 100  # top right
    stored = upright if row0 in ("top", "bottom") else upright.T
    stored = stored[::-1] if row0 in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column0 in ("right", "bottom") else stored
    image = Image.fromarray(numpy.ascontiguousarray(stored)).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(folder / "train" / "bar" / f"0.{suffix}", exif=exif, quality=95)
    (folder / "train" / "bar" / "a.png").unlink()
    pixels = load_data("folder", folder, size=56).train[1][0].mean(0) * 255
    corners = [pixels[5, 5], pixels[5, -5], pixels[-5, 5], pixels[-5, -5]]
    assert torch.tensor(corners).sub(torch.tensor([200.0, 100, 0, 0])).abs().max() < 12


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.mark.parametrize("suffix", ["png", "jpg", "ppm", "bmp", "tif", "webp"])
def test_damaged_files_are_named(folder, suffix):
    """Cut at many places: one line that names the file, and no other exception."""
    path, lines = folder / "train" / "bar" / f"0.{suffix}", []
    NOISE.save(path)
    (folder / "train" / "bar" / "a.png").unlink()
    whole, data = path.read_bytes(), load_data("folder", folder, size=21)
    cuts = range(0, len(whole) - 64, 1 + len(whole) // 23)
    for at in cuts:
        path.write_bytes(whole[:at])
        with pytest.raises(FastjacError) as caught:
            data.train[1]
        lines.append(str(caught.value))
    assert all(f"{path} is not a readable image: " in t and "\n" not in t for t in lines)


def test_bombs_and_files_that_went_away(folder, monkeypatch):
    data = load_data("folder", folder, size=21)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(FastjacError, match=r"bar/a.png is not a readable image: Image size \(1200"):
        data.train[1]
    (folder / "train" / "bar" / "a.png").unlink()
    with pytest.raises(FastjacError, match=r"bar/a.png is not a readable image: .*No such file"):
        data.train[1]


def test_damaged_images_are_left_out_and_counted(folder, caplog):
    for name in ("b.png", "c.png"):
        (folder / "train" / "bar" / name).write_bytes(b"not an image")
    data = load_data("folder", folder, size=21, skip_damaged=True)
    check_colours(data.train, data.classes, 3)
    assert len(data.labels) == 3
    assert "2 of 5 images left out; " in caplog.text
    assert "bar/b.png is not a readable image" in caplog.text
    (folder / "val" / "bar" / "a.png").write_bytes(b"")
    with pytest.raises(FastjacError, match="folder: no test image of class 'bar' can be read"):
        load_data("folder", folder, size=21, skip_damaged=True)


def test_hidden_files_and_folders_are_skipped_and_counted(folder, caplog):
    train = folder / "train"
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"):
        save(train / name / "a.png", (1, 2, 3))
        save(train / "bar" / name / "deeper" / "a.png", (1, 2, 3))
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (train / "bar" / name).write_bytes(b"\0\5\x16\7")
        (train / name).write_bytes(b"")
    save(train / "bar" / "B.PNG", COLOURS["bar"])
    save(train / "bar" / "more" / "c.JPEG", COLOURS["bar"])
    data = load_data("folder", folder, size=21)
    assert list(data.classes) == sorted(COLOURS)
    check_colours(data.train, data.classes, 5)
    assert f"{train}: 16 hidden files and folders skipped, such as bar/.DS_Store" in caplog.text
    others = "2 files whose names do not end as images do skipped, such as bar/notes.txt"
    assert f"{train}: {others}" in caplog.text


def test_a_hidden_folder_above_the_images_is_no_reason(folder, tmp_path):
    (tmp_path / ".cache").mkdir()
    for part in ("train", "val"):
        (folder / part).rename(tmp_path / ".cache" / part)
    check_colours(load_data("folder", tmp_path / ".cache", size=21).train, sorted(COLOURS), 3)


def test_an_empty_class_is_named(folder):
    (folder / "train" / "bar" / "a.png").rename(folder / "train" / "bar" / ".a.png")
    fails(
        r"folder: class 'bar': .*/train/bar has no image; images end in .jpg",
        "folder",
        folder,
    )
