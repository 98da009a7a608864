"""The data sets: where their files lie, what is in them, what is wrong with them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fastjac.data.idx import read_idx
from fastjac.data.image_files import (
    EXTENSIONS,
    SKIP_DAMAGED,
    Images,
    Listing,
    is_hidden,
    list_images,
    middle_crop,
    no_image,
    without_damaged,
)
from fastjac.errors import FastjacError, first_line, notice, read_text, reading, unknown
from fastjac.models.create import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class ImageData:
    """A data set in two parts. Items: image ``[channels, size, size]`` in [0, 1], and class.

    Attributes:
        name: of the data set.
        train, test: the two parts; only ``train`` is ever augmented.
        labels: the class of each item of ``train``; -1 of one without a label.
        classes: their names, by index.
        channels, size: of an image.
        mean, std: of the pixels, per channel, for the networks' own normalisation.
        from_rgb: makes of any image in RGB what those of ``train`` are, augmented as they are.
    """

    name: str
    train: Dataset
    test: Dataset
    labels: Sequence[int]
    classes: Sequence[str]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    from_rgb: Callable[[Any], Tensor] | None = None


Augmentation = Literal["none", "flip", "crop"]


def load_data(
    name: str,
    root: str | Path | None = None,
    size: int | None = None,
    augment: bool = False,
    download: bool = False,
    skip_damaged: bool = False,
    channels: int | None = None,
    validation: int | None = None,
    flip: bool = False,
) -> ImageData:
    """The data set ``name``: ``digits``, ``fashion-mnist``, ``cifar100``, ``mit67`` or ``folder``.

    Args:
        root: the folder with its files; ``digits`` needs none, and ``fashion-mnist`` is looked for where
            Debian's package dataset-fashion-mnist puts it.
        size: height and width of the images; None: 16 (digits), 32 (fashion-mnist, whose 28 are
            padded, and cifar100), 224 (the others).
        augment: random crops and horizontal flips of the training images.
        download: fetch what is missing; ``cifar100`` and ``fashion-mnist`` only.
        skip_damaged: read every image of ``mit67`` or ``folder`` first, and leave out those that
            cannot be, with a notice of how many; else such an image raises when its turn comes.
        channels: of an image; 3 repeats the greyscale of ``digits`` and ``fashion-mnist``; None: as
            the images are.
        validation: hold out that many training images, always the same, and give them as ``test``.
        flip: horizontal flips of the training images alone.

    Raises :class:`fastjac.errors.FastjacError` for an unknown name, and for a missing or corrupt
    file, naming it and what was expected. Augmentation draws from torch's global generator.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if augment and flip:
        raise FastjacError("--augment flips the images as well: give it or --flip")
    if name == "digits" and (augment or flip):
        raise FastjacError("digits: a flipped digit is another digit; it has no augmentation")
    if download and name not in ("cifar100", "fashion-mnist"):
        raise FastjacError(
            f"{name} cannot be downloaded by this program; only cifar100 and fashion-mnist can"
        )
    if root is None and name == "fashion-mnist" and not download:
        root = _DEBIAN_FASHION_MNIST
    if root is None and name != "digits":
        raise FastjacError(f"{name}: the folder of its files is missing (--data-dir)")
    moves: Augmentation = "crop" if augment else "flip" if flip else "none"
    side = _SIZES.get(name, 224) if size is None else size

    def load(moves: Augmentation) -> ImageData:
        with reading():
            if name == "digits":
                data = _digits(side)
            elif name == "fashion-mnist":
                data = _fashion_mnist(Path(root), side, moves, download)
            elif name == "cifar100":
                data = _cifar100(Path(root), side, moves, download)
            else:
                files = _mit67(Path(root)) if name == "mit67" else _folder(Path(root), validation)
                data = _photographs(name, *files, side, moves, skip_damaged)
        return data if channels in (None, data.channels) else _repeat_channels(data, channels)

    data = load(moves)
    if validation is None:
        return data
    plain = data if moves == "none" else load("none")  # what is held out is not augmented
    return _hold_out(data, plain.train, validation)


_SIZES = {"digits": 16, "fashion-mnist": 32, "cifar100": 32}


def evaluation_transform(name: str, size: int, channels: int) -> Callable[[Any], Tensor]:
    """Makes of an image in RGB what the test images of the data set ``name`` are.

    A PIL image or a uint8 tensor ``[3, H, W]`` becomes ``[channels, size, size]`` float32 in [0, 1]. Of
    photographs (``mit67``, ``folder``) it is the middle, as :func:`middle_crop` cuts it, of others the
    largest square.
    """
    from torchvision.transforms import v2

    if name in ("mit67", "folder"):
        return middle_crop(size)
    grey = [v2.Grayscale(channels)] if name in ("digits", "fashion-mnist") else []
    if name == "fashion-mnist":
        return v2.Compose([*grey, _whole(28), *_to_size(size)])
    return v2.Compose([*grey, _whole(size)])


def add_unlabelled(data: ImageData, folder: str | Path, skip_damaged: bool = False) -> ImageData:
    """``data`` with the images in ``folder`` and below as further training images, of label -1.

    They are read, cut to size and augmented as those of the data set are; what is hidden is skipped,
    with a notice. Raises for a folder without images.
    """
    folder = Path(folder)
    found = list_images(folder)
    found.tell(folder)
    samples = [(path, -1) for path in found.images]
    if skip_damaged:
        samples = without_damaged(samples)
    if not samples:
        raise no_image(folder)
    items = _Transformed(data.train, torch.nn.Identity())  # each with its label as an int
    images = ConcatDataset([items, Images(samples, data.from_rgb, SKIP_DAMAGED)])
    return replace(data, train=images, labels=[*data.labels, *(label for _, label in samples)])


DATASETS = ("digits", "fashion-mnist", "cifar100", "mit67", "folder")


class _Transformed(Dataset):
    """Items with ``transform`` of their image."""

    def __init__(self, items: Dataset, transform: Callable[[Any], Tensor]) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.items[index]
        return self.transform(image), int(label)


class NoisyImages(Dataset):
    """Items with Gaussian noise on the image, the same at each reading; not clipped to [0, 1]."""

    def __init__(self, items: Dataset, sigma: float) -> None:
        self.items, self.sigma = items, sigma

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.items[index]
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(index))
        return image + self.sigma * noise, int(label)


class _Repeat:
    """A greyscale image as one of several equal channels."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, image: Tensor) -> Tensor:
        return image.expand(self.channels, -1, -1)


def _repeat_channels(data: ImageData, channels: int) -> ImageData:
    if data.channels != 1 or channels != 3:
        raise FastjacError(
            f"{data.name} has images of {data.channels} channels, got --channels {channels}; "
            "expected 3 for greyscale images, repeated"
        )
    from torchvision.transforms import v2

    repeat = _Repeat(channels)
    return replace(
        data,
        train=_Transformed(data.train, repeat),
        test=_Transformed(data.test, repeat),
        channels=channels,
        mean=data.mean * channels,
        std=data.std * channels,
        from_rgb=v2.Compose([data.from_rgb, repeat]),
    )


def _hold_out(data: ImageData, plain: Dataset, count: int) -> ImageData:
    """``data`` with ``count`` training images, drawn by a seed of its own, of ``plain`` as ``test``."""
    images = len(data.labels)
    if not 1 <= count < images:
        raise FastjacError(
            f"{data.name} has {images} training images; expected 1 to {images - 1} to hold out, "
            f"got {count}"
        )
    order = torch.randperm(images, generator=torch.Generator().manual_seed(2018)).tolist()
    kept, held = sorted(order[count:]), sorted(order[:count])
    return replace(
        data,
        train=Subset(data.train, kept),
        test=Subset(plain, held),
        labels=[data.labels[index] for index in kept],
    )


def _digits(size: int) -> ImageData:
    """scikit-learn's 1797 handwritten digits: 1297 to train on and 500 to test, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torchvision.transforms import v2

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(bunch.target)
    train, test = train_test_split(
        range(len(labels)), test_size=500, random_state=0, stratify=bunch.target
    )
    pixels = images[train]
    return ImageData(
        name="digits",
        train=TensorDataset(pixels, labels[train]),
        test=TensorDataset(images[test], labels[test]),
        labels=labels[train].tolist(),
        classes=[str(k) for k in range(10)],
        channels=1,
        size=size,
        mean=(pixels.mean().item(),),
        std=(pixels.std().item(),),
        from_rgb=v2.Compose([v2.Grayscale(), _whole(size)]),
    )


def _whole(size: int) -> Callable[[Any], Tensor]:
    """The largest square in the middle of an image, in that size."""
    from torchvision.transforms import v2

    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), to_float])


_DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # of its package dataset-fashion-mnist
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip


def _fashion_mnist(root: Path, size: int, moves: Augmentation, download: bool) -> ImageData:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf, 2017): four IDX files, compressed or not."""
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import v2

    if download:
        try:
            FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            raise FastjacError(
                f"fashion-mnist: its files could not be fetched into {root}: {first_line(error)}"
            ) from error
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(path := _idx_file(root, f"{part}-images-idx3-ubyte"), 3)
        labels = read_idx(beside := _idx_file(root, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels) or not len(images) or images.shape[1:] != (28, 28):
            raise FastjacError(
                f"{path} and {beside}: expected as many images of 28 x 28 as labels, got "
                f"{list(images.shape)} and {list(labels.shape)}"
            )
        if (highest := int(labels.max())) >= len(_FASHION_CLASSES):
            raise FastjacError(f"{beside}: expected labels from 0 to 9, got {highest}")
        parts.append(TensorDataset(images[:, None], labels.long()))
    fit, to_float = _to_size(size), v2.ToDtype(torch.float32, scale=True)
    plain = v2.Compose([*fit, to_float])
    moved = v2.Compose([*_moves(moves, v2.RandomCrop(28, padding=2)), *fit, to_float])
    train, test = parts
    return ImageData(
        name="fashion-mnist",
        train=_Transformed(train, moved),
        test=_Transformed(test, plain),
        labels=train.tensors[1].tolist(),
        classes=_FASHION_CLASSES,
        channels=1,
        size=size,
        mean=(0.2190,),  # of the training images at 32 x 32
        std=(0.3318,),
        from_rgb=v2.Compose([v2.Grayscale(), _whole(28), moved]),
    )


def _to_size(size: int) -> list[Callable[[Any], Any]]:
    """28 in the middle of 32, as the paper's networks halve five times; other sizes from there."""
    from torchvision.transforms import v2

    return [v2.Pad(2), *([] if size == 32 else [v2.Resize(size)])]


def _moves(moves: Augmentation, crop: Callable[[Any], Any]) -> list[Callable[[Any], Any]]:
    """The augmentation: ``crop`` and flips, flips alone, or nothing."""
    from torchvision.transforms import v2

    flips = [v2.RandomHorizontalFlip()]
    return {"crop": [crop, *flips], "flip": flips, "none": []}[moves]


def _idx_file(root: Path, name: str) -> Path:
    """``root/name``, compressed or not, or where torchvision puts it."""
    places = [
        folder / (name + end)
        for folder in (root, root / "FashionMNIST" / "raw")
        for end in ("", ".gz")
    ]
    for path in places:
        if path.is_file():
            return path
    raise FastjacError(
        f"fashion-mnist: {places[1]} is missing; expected the four IDX files, or torchvision's "
        "FashionMNIST/raw (--data-dir says where, --download gets them, Debian's package "
        "dataset-fashion-mnist has them)"
    )


def _cifar100(root: Path, size: int, moves: Augmentation, download: bool) -> ImageData:
    from torchvision.datasets import CIFAR100
    from torchvision.transforms import v2

    if download:
        try:
            CIFAR100(root, download=True)
        except (OSError, RuntimeError) as error:
            raise FastjacError(
                f"cifar100: {CIFAR100.url} could not be fetched into {root}: {first_line(error)}"
            ) from error
    files = [*CIFAR100.train_list, *CIFAR100.test_list]
    files.append((CIFAR100.meta["filename"], CIFAR100.meta["md5"]))
    for file, md5 in files:
        _check_md5(root / CIFAR100.base_folder / file, md5)
    resize = [] if size == 32 else [v2.Resize(size)]
    plain = [v2.ToImage(), *resize, v2.ToDtype(torch.float32, scale=True)]
    moved = v2.Compose([v2.ToImage(), *_moves(moves, v2.RandomCrop(32, padding=4)), *plain[1:]])
    train = CIFAR100(root, train=True, transform=moved)
    return ImageData(
        name="cifar100",
        train=train,
        test=CIFAR100(root, train=False, transform=v2.Compose(plain)),
        labels=train.targets,
        classes=train.classes,
        channels=3,
        size=size,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        from_rgb=v2.Compose([_whole(32), moved]),
    )


def _check_md5(path: Path, expected: str) -> None:
    if not path.is_file():
        raise FastjacError(
            f"cifar100: {path} is missing; expected the unpacked python version "
            "(--download gets it)"
        )
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != expected:
        raise FastjacError(f"cifar100: {path} is corrupt: its md5 is {found}, expected {expected}")


def _photographs(
    name: str,
    train: Sequence[tuple[Path, int]],
    test: Sequence[tuple[Path, int]],
    classes: Sequence[str],
    size: int,
    moves: Augmentation,
    skip_damaged: bool,
) -> ImageData:
    from torchvision.transforms import v2

    if skip_damaged:
        train, test = without_damaged(train), without_damaged(test)
        for part, samples in (("training", train), ("test", test)):
            if absent := set(range(len(classes))) - {label for _, label in samples}:
                raise FastjacError(
                    f"{name}: no {part} image of class {classes[min(absent)]!r} can be read"
                )
    to_float = v2.ToDtype(torch.float32, scale=True)
    middle = moved = middle_crop(size)
    if moves == "flip":
        moved = v2.Compose([middle, v2.RandomHorizontalFlip()])
    elif moves == "crop":
        crop = _moves(moves, v2.RandomResizedCrop(size))
        moved = v2.Compose([v2.ToImage(), *crop, to_float])
    return ImageData(
        name=name,
        train=Images(train, moved, SKIP_DAMAGED),
        test=Images(test, middle, SKIP_DAMAGED),
        labels=[label for _, label in train],
        classes=classes,
        channels=3,
        size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        from_rgb=moved,
    )


# The images to train on, those to test, each with its label, and the classes.
_Files = tuple[list[tuple[Path, int]], list[tuple[Path, int]], list[str]]


def _mit67(root: Path) -> _Files:
    """MIT Indoor 67 by its official lists."""
    lists = {part: _read_list(root, f"{part}Images.txt") for part in ("Train", "Test")}
    classes = sorted({name for name, _ in lists["Train"]})
    _same_classes(
        f"{root / 'TestImages.txt'}",
        {name for name, _ in lists["Test"]},
        f"{root / 'TrainImages.txt'}",
        set(classes),
    )
    index = {name: k for k, name in enumerate(classes)}
    train, test = ([(path, index[k]) for k, path in part] for part in lists.values())
    return train, test, classes


def _read_list(root: Path, name: str) -> list[tuple[str, Path]]:
    """Class and path of each image that a list names."""
    path, entries = root / name, []
    if not path.is_file():
        raise FastjacError(
            f"mit67: {path} is missing; expected the official list, lines of class/file.jpg"
        )
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        kind, slash, file = line.strip().partition("/")
        if not (kind and slash and file):
            raise FastjacError(f"{path}, line {number}: expected class/file.jpg, got {line!r}")
        image = root / "Images" / kind / file
        if not image.is_file():
            raise FastjacError(f"{path}, line {number}: names {image}, which is missing")
        entries.append((kind, image))
    if not entries:
        raise FastjacError(f"{path} is empty; expected lines of class/file.jpg")
    return entries


def _folder(root: Path, validation: int | None) -> _Files:
    """``train/<class>/*`` and ``val/<class>/*``; the former alone, or ``<class>/*``, to hold out of."""
    train = root / "train"
    if validation is not None:
        images, classes = _image_folder(train if train.is_dir() else root)
        return images, images, classes
    tests = [root / name for name in ("val", "valid", "validation", "test")]
    test = next((path for path in tests if path.is_dir()), tests[0])
    for part in (train, test):
        if not part.is_dir():
            raise FastjacError(
                f"folder: {part} is missing; expected {root}/train/<class>/* and {root}/val/<class>/* "
                "(or valid, validation, test), or --validation N, which holds out training images"
            )
    (images, classes), (held, names) = _image_folder(train), _image_folder(test)
    _same_classes(str(test), set(names), str(train), set(classes))
    return images, held, classes


def _image_folder(root: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """The images and the classes of a folder; says what is skipped of it."""
    folders: dict[str, Path] = {}
    for path in sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name)):
        # macOS writes an accent as a character of its own, other systems as one with its letter.
        name = unicodedata.normalize("NFC", path.name)
        if name in folders:
            raise FastjacError(
                f"folder: {root} has {folders[name].name!a} and {path.name!a}, one name in two "
                "spellings of Unicode; expected one folder"
            )
        folders[name] = path
    if not folders:
        raise FastjacError(f"folder: {root} has no folder of a class")
    samples, found, classes = [], Listing(), sorted(folders)
    for label, name in enumerate(classes):
        inside = list_images(folders[name])
        if not inside.images:
            raise FastjacError(f"folder: class {name!r}: {no_image(folders[name])}")
        samples += [(path, label) for path in inside.images]
        found.add(inside)
    loose = sorted(path for path in root.iterdir() if not path.is_dir())
    found.hidden += [path for path in sorted(root.iterdir()) if is_hidden(path.name)]
    loose = [path for path in loose if not is_hidden(path.name)]
    if gone := [path for path in loose if not path.exists() and not path.suffix]:
        raise FastjacError(
            f"folder: {gone[0]} is a link to what is not there; expected a class's folder"
        )
    found.others += [path for path in loose if path.suffix.lower() not in EXTENSIONS]
    found.tell(root)
    if images := [path for path in loose if path.suffix.lower() in EXTENSIONS]:
        notice(
            f"{root}: {len(images)} images in no class's folder skipped, such as {images[0].name}"
        )
    return samples, classes


def _same_classes(test_name: str, test: set[str], train_name: str, train: set[str]) -> None:
    for extra, there, absent in (
        (test - train, test_name, train_name),
        (train - test, train_name, test_name),
    ):
        if extra:
            raise FastjacError(
                f"{there} has {len(extra)} classes that {absent} has not, such as {min(extra)!r}"
            )
