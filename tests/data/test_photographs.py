"""MIT Indoor 67 by its lists, and folders of images, from small trees in their formats."""

import doctest
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fastjac import FastjacError
from fastjac.data import evaluation_transform, image_files, load_data, read_image

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
    train.write_text("\ufeff" + good, "utf-8")  # as some editors do
    assert len(load_data("mit67", mit67, size=21).classes) == 3
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


def write_tiff(path, array, kind, bits, white_is_zero=False):
    """64 x 64 samples in one strip; ``kind`` 1: unsigned, 2: signed, 3: floating point."""
    raw = array.tobytes()
    entries = [(256, 4, 64), (257, 4, 64), (258, 3, bits), (259, 3, 1), (262, 3, not white_is_zero)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 4, 64), (279, 4, len(raw)), (339, 3, kind)]
    table = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(raw))
    path.write_bytes(head + raw + struct.pack("<H", len(entries)) + table + bytes(4))


def twelve_bits():
    one, other = (RAMP * 4095).astype(int).reshape(-1, 2).T
    packed = [one >> 4, (one & 15) << 4 | other >> 8, other & 255]
    return numpy.stack(packed, 1).astype("u1")


@pytest.mark.parametrize(
    ("array", "kind", "bits", "white_is_zero"),
    [
        (RAMP * 32767, "<i2", 16, False),
        (twelve_bits(), "u1", 12, False),
        ((1 - RAMP) * 255, "u1", 8, True),
        ((1 - RAMP) * 65535, "<u2", 16, True),
        (1 - RAMP, "<f4", 32, True),
        (RAMP * 65535, "<i4", 32, False),
    ],
)
def test_tiff_says_what_its_numbers_mean(folder, array, kind, bits, white_is_zero):
    path = folder / "train" / "bar" / "0.tif"
    code = {"u": 1, "i": 2, "f": 3}[numpy.dtype(kind).kind]
    write_tiff(path, array.astype(kind), code, bits, white_is_zero)
    pixels = load_data("folder", folder, size=56).train[1][0]
    assert (pixels.mean((0, 1)) - torch.linspace(0, 1, 64)[4:60]).abs().max() < 0.03


def test_signed_bytes_are_refused(folder):
    write_tiff(folder / "train" / "bar" / "0.tif", (RAMP * 100).astype("i1"), 2, 8)
    with pytest.raises(
        FastjacError, match=r"bar/0.tif is .*: its pixels are signed bytes; save it"
    ):
        _ = load_data("folder", folder, size=21).train[1]


def test_nearly_black_images_are_told_of_once(folder, caplog, monkeypatch):
    """12 bits in a file of 16, say: read by the range of the type all the same."""
    monkeypatch.setattr(image_files, "_told_dark", [])
    for name in ("0.png", "1.png"):
        Image.fromarray((RAMP * 4095).astype("uint16")).save(folder / "train" / "bar" / name)
    data = load_data("folder", folder, size=21)
    assert max(data.train[item][0].max() for item in (1, 2)) < 0.07
    assert "bar/0.png: its brightest pixel is 4095 of 65535, nearly black; if that" in caplog.text
    assert caplog.text.count("nearly black") == 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first(folder, suffix):
    path = folder / "train" / "bar" / f"0.{suffix}"
    frames = [Image.new("RGB", (64, 64), (0, 0, 0))] * 3
    GREY.convert("RGB").save(path, save_all=True, append_images=frames)
    pixels = load_data("folder", folder, size=56).train[1][0]
    assert (pixels.mean((0, 1)) - torch.linspace(0, 1, 64)[4:60]).abs().max() < 0.05


def test_links(folder, tmp_path, caplog):
    """To folders and files elsewhere; back to a folder above, to each other, and to nothing."""
    bar = folder / "train" / "bar"
    (tmp_path / "elsewhere").mkdir()
    (bar / "a.png").rename(tmp_path / "elsewhere" / "a.png")
    (bar / "files").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (bar / "up").symlink_to(folder / "train", target_is_directory=True)
    (folder / "train" / "loose.png").write_bytes(b"of no class")
    data = load_data("folder", folder, size=21)
    check_colours(data.train, data.classes, 3)
    assert f"{folder / 'train'}: 1 images in no class's folder skipped, such as l" in caplog.text
    for name, to, message in (
        ("x.png", "y.png", "Too many levels"),
        ("z.png", "no", "No such file"),
    ):
        (bar / name).symlink_to(bar / to)
        if to == "y.png":
            (bar / to).symlink_to(bar / name)
        data = load_data("folder", folder, size=21)
        item = [path.name for path, _ in data.train.samples].index(name)
        with pytest.raises(FastjacError, match=rf"{name} is not a readable image: .*{message}"):
            _ = data.train[item]


def test_a_class_that_is_a_link_to_nothing(folder):
    """As where a disk is not mounted: the run would be one of fewer classes."""
    (folder / "train" / ".#lock").symlink_to("nobody@nowhere")  # an editor's
    load_data("folder", folder)
    (folder / "train" / "bar").rename(folder / "bar")
    (folder / "train" / "bar").symlink_to(folder / "nowhere")
    fails(r"train/bar is a link to what is not there; expected a class's folder", "folder", folder)


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_files.os, "scandir", refuse)
    with pytest.raises(
        FastjacError, match="train/airport_inside cannot be read: Permission denied"
    ):
        load_data("folder", folder, size=21)


@pytest.mark.parametrize("name", ["folder", "mit67", "fashion-mnist", "cifar100"])
def test_what_the_system_does_not_let_one_read(tmp_path, monkeypatch, name):
    def refuse(self, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(FastjacError, match=rf"{tmp_path}/.* cannot be read: Permission denied$"):
        load_data(name, tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Image.new("L", (1, 1500)),
            "it has 1 x 1500 pixels; expected an aspect ratio of at most 1000",
        ),
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


def test_a_flipped_bit_of_a_png_is_found(folder):
    """Pillow's decoder takes some for other pixels, black ones say: it does not compare checksums."""
    path = folder / "train" / "bar" / "flat.png"
    Image.new("RGB", (64, 64), "red").save(path)
    whole = path.read_bytes()
    at = whole.index(b"IDAT") + 4
    for k in range(at, at + 40):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :])
        data = load_data("folder", folder, size=21)
        index = next(i for i, (p, _) in enumerate(data.train.samples) if p == path)
        with pytest.raises(FastjacError, match=r"flat\.png is not a readable image: "):
            data.train[index]


def test_a_name_of_two_lines_is_told_in_one(folder):
    (folder / "train" / "bar" / "0\n1.png").write_bytes(b"")
    with pytest.raises(FastjacError, match=r"bar/0\\n1.png is not a readable image: ") as caught:
        _ = load_data("folder", folder, size=21).train[1]
    assert "\n" not in str(caught.value)


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
    names = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "@Recycle", "#snapshot")
    for name in names:
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
    assert f"{train}: 20 hidden files and folders skipped, such as bar/.DS_Store" in caplog.text
    others = "2 files whose names do not end as images do skipped, such as bar/notes.txt"
    assert f"{train}: {others}" in caplog.text


def test_a_hidden_folder_above_the_images_is_no_reason(folder, tmp_path):
    (tmp_path / ".cache").mkdir()
    for part in ("train", "val"):
        (folder / part).rename(tmp_path / ".cache" / part)
    check_colours(load_data("folder", tmp_path / ".cache", size=21).train, sorted(COLOURS), 3)


def test_a_class_in_two_spellings_of_unicode(tmp_path):
    """An accent is a character of its own on macOS: the folders of train and val may differ in it."""
    for part, form in (("train", "NFC"), ("val", "NFD")):
        for name in ("été", "zoo", "ête"):
            folder = tmp_path / part / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), "red" if name == "été" else "blue").save(folder / "a.png")
    data = load_data("folder", tmp_path, 8)
    assert list(data.classes) == ["zoo", "été", "ête"]
    for items in (data.train, data.test):
        assert [(y, bool(x[0].mean() > 0.5)) for x, y in items] == [(0, 0), (1, 1), (2, 0)]
    (tmp_path / "val" / "été").mkdir()
    with pytest.raises(
        FastjacError, match=r"val has 'e\\u0301te\\u0301' and '\\xe9t\\xe9', one name"
    ):
        load_data("folder", tmp_path, 8)


def test_an_empty_class_is_named(folder):
    (folder / "train" / "bar" / "a.png").rename(folder / "train" / "bar" / ".a.png")
    fails(
        r"folder: class 'bar': .*/train/bar has no image; images end in .jpg",
        "folder",
        folder,
    )


@pytest.mark.parametrize("inside", ["train", "."])
def test_images_held_out_of_a_folder(folder, inside):
    """Of ``train``, or of the folder itself; ``val`` need not be there."""
    shutil.rmtree(folder / "val")
    if inside == ".":
        shutil.copytree(folder / "train", folder, dirs_exist_ok=True)
        shutil.rmtree(folder / "train")
    fails("is missing; .* or --validation N, which holds out training images", "folder", folder)
    data = load_data("folder", folder, size=21, validation=1)
    assert list(data.classes) == sorted(COLOURS)
    check_colours(data.train, data.classes, 2)
    check_colours(data.test, data.classes, 1)
    assert sorted([data.test[0][1], *data.labels]) == [0, 1, 2]


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_val(folder, name):
    for path in (folder / "val").iterdir():
        save(folder / name / path.name / "b.png", COLOURS[path.name])
    assert [path.name for path, _ in load_data("folder", folder).test.samples] == ["a.png"] * 3
    (folder / "val").rename(folder / "else")
    assert [path.name for path, _ in load_data("folder", folder).test.samples] == ["b.png"] * 3


def test_a_photograph_as_the_test_images_are(folder):
    path = folder / "val" / "bar" / "a.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (40, 60, 3), "uint8")).save(path)
    data = load_data("folder", folder, size=21, augment=True)
    made = evaluation_transform("folder", 21, 3)(read_image(path))
    assert torch.equal(made, data.test[list(data.classes).index("bar")][0])


def test_read_image_by_its_example():
    result = doctest.testmod(image_files)
    assert result.attempted == 2
    assert result.failed == 0
