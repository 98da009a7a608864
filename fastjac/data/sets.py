"""The data sets: where their files lie, what is in them, what is wrong with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fastjac.errors import FastjacError, unknown
from fastjac.models.create import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class ImageData:
    """A data set in two parts. Items: image ``[channels, size, size]`` in [0, 1], and class.

    Attributes:
        name: of the data set.
        train, test: the two parts; only ``train`` is ever augmented.
        labels: the class of each item of ``train``.
        classes: their names, by index.
        channels, size: of an image.
        mean, std: of the pixels, per channel, for the networks' own normalisation.
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


def load_data(
    name: str,
    root: str | Path | None = None,
    size: int | None = None,
    augment: bool = False,
    download: bool = False,
) -> ImageData:
    """The data set ``name``: ``digits``, ``cifar100``, ``mit67`` or ``folder``.

    Args:
        root: the folder with its files; ``digits`` needs none.
        size: height and width of the images; None: 16 (digits), 32 (cifar100), 224 (the others).
        augment: random crops and horizontal flips of the training images.
        download: fetch what is missing; ``cifar100`` only.

    Raises :class:`fastjac.errors.FastjacError` for an unknown name, and for a missing or corrupt
    file, naming it and what was expected. Augmentation draws from torch's global generator.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if name == "digits":
        if augment:
            raise FastjacError("digits: a flipped digit is another digit; it has no augmentation")
        return _digits(16 if size is None else size)
    if download and name != "cifar100":
        raise FastjacError(f"{name} cannot be downloaded by this program; only cifar100 can")
    if root is None:
        raise FastjacError(f"{name}: the folder of its files is missing (--data-dir)")
    if name == "cifar100":
        return _cifar100(Path(root), 32 if size is None else size, augment, download)
    build = _mit67 if name == "mit67" else _folder
    return build(Path(root), 224 if size is None else size, augment)


DATASETS = ("digits", "cifar100", "mit67", "folder")


def _digits(size: int) -> ImageData:
    """scikit-learn's 1797 handwritten digits: 1297 to train on and 500 to test, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

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
    )


def _cifar100(root: Path, size: int, augment: bool, download: bool) -> ImageData:
    from torchvision.datasets import CIFAR100
    from torchvision.transforms import v2

    if download:
        try:
            CIFAR100(root, download=True)
        except (OSError, RuntimeError) as error:
            raise FastjacError(
                f"cifar100: {CIFAR100.url} could not be fetched into {root}: {_first_line(error)}"
            ) from error
    files = [*CIFAR100.train_list, *CIFAR100.test_list]
    files.append((CIFAR100.meta["filename"], CIFAR100.meta["md5"]))
    for file, md5 in files:
        _check_md5(root / CIFAR100.base_folder / file, md5)
    resize = [] if size == 32 else [v2.Resize(size)]
    plain = [v2.ToImage(), *resize, v2.ToDtype(torch.float32, scale=True)]
    moved = [v2.ToImage(), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain[1:]]
    train = CIFAR100(root, train=True, transform=v2.Compose(moved if augment else plain))
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


class _Images(Dataset):
    """Image files, read as RGB."""

    def __init__(
        self, samples: Sequence[tuple[Path, int]], transform: Callable[[Any], Tensor]
    ) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise FastjacError(f"{path} is not a readable image: {_first_line(error)}") from error
        return self.transform(pixels), label


def _photographs(
    name: str,
    train: Sequence[tuple[Path, int]],
    test: Sequence[tuple[Path, int]],
    classes: Sequence[str],
    size: int,
    augment: bool,
) -> ImageData:
    from torchvision.transforms import v2

    to_float = v2.ToDtype(torch.float32, scale=True)
    middle = [v2.ToImage(), v2.Resize(size * 8 // 7), v2.CenterCrop(size), to_float]
    moved = [v2.ToImage(), v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), to_float]
    return ImageData(
        name=name,
        train=_Images(train, v2.Compose(moved if augment else middle)),
        test=_Images(test, v2.Compose(middle)),
        labels=[label for _, label in train],
        classes=classes,
        channels=3,
        size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _mit67(root: Path, size: int, augment: bool) -> ImageData:
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
    return _photographs("mit67", train, test, classes, size, augment)


def _read_list(root: Path, name: str) -> list[tuple[str, Path]]:
    """Class and path of each image that a list names."""
    path, entries = root / name, []
    if not path.is_file():
        raise FastjacError(
            f"mit67: {path} is missing; expected the official list, lines of class/file.jpg"
        )
    for number, line in enumerate(path.read_text().splitlines(), 1):
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


def _folder(root: Path, size: int, augment: bool) -> ImageData:
    """``train/<class>/*`` and ``val/<class>/*``."""
    from torchvision.datasets import ImageFolder

    parts = {}
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise FastjacError(
                f"folder: {root / part} is missing; expected {root}/train/<class>/* and "
                f"{root}/val/<class>/*"
            )
        try:
            parts[part] = ImageFolder(root / part)
        except FileNotFoundError as error:
            raise FastjacError(f"folder: {_first_line(error)}") from error
    train, val = parts["train"], parts["val"]
    _same_classes(f"{root / 'val'}", set(val.classes), f"{root / 'train'}", set(train.classes))
    samples = ([(Path(path), label) for path, label in part.samples] for part in (train, val))
    return _photographs("folder", *samples, train.classes, size, augment)


def _same_classes(test_name: str, test: set[str], train_name: str, train: set[str]) -> None:
    for extra, there, absent in (
        (test - train, test_name, train_name),
        (train - test, train_name, test_name),
    ):
        if extra:
            raise FastjacError(
                f"{there} has {len(extra)} classes that {absent} has not, such as {min(extra)!r}"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
