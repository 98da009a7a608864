"""Image files: which of a folder's they are, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from fastjac.errors import FastjacError, first_line, notice

# Those that torchvision's ImageFolder takes, and further ones that Pillow reads.
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jfif", ".jpe", ".jp2", ".avif", ".pbm", ".pnm", ".tga",
)  # fmt: skip
_SYSTEM_NAMES = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "thumbs.db",
    "ehthumbs.db", "desktop.ini", "lost+found",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is its system's or a tool's, and no user's."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


@dataclass
class Listing:
    """The files in a folder and below; a folder's own, in the order of their names, come first.

    Attributes:
        images: by their extension.
        hidden: files and folders; what is in the latter is not looked at.
        others: all other files.
    """

    images: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def add(self, other: Listing) -> None:
        """Take up what another folder has."""
        self.images += other.images
        self.hidden += other.hidden
        self.others += other.others

    def tell(self, folder: Path) -> None:
        """Say what is skipped, if anything is."""
        for kind, paths in (
            ("hidden files and folders", self.hidden),
            ("files whose names do not end as images do", self.others),
        ):
            if paths:
                notice(
                    f"{folder}: {len(paths)} {kind} skipped, such as {paths[0].relative_to(folder)}"
                )


def list_images(folder: Path) -> Listing:
    """What lies in ``folder`` and below; links are followed, but not back to where they lie.

    Raises :class:`FastjacError` for a folder that cannot be read.
    """
    found = Listing()
    _list(folder, found, (os.path.realpath(folder),))
    return found


def _list(folder: Path, found: Listing, above: tuple[str, ...]) -> None:
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: (entry.is_dir(), entry.name))
    except OSError as error:
        raise FastjacError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in inside:
        path = folder / entry.name
        if is_hidden(entry.name):
            found.hidden.append(path)
        elif entry.is_dir():
            if (real := os.path.realpath(path)) not in above:
                _list(path, found, (*above, real))
        # A link to a file that is gone is an image that cannot be read.
        elif path.suffix.lower() in EXTENSIONS and (entry.is_file() or not path.exists()):
            found.images.append(path)
        else:
            found.others.append(path)


def no_image(folder: Path) -> FastjacError:
    """The error for a folder without images."""
    return FastjacError(f"{folder} has no image; images end in {', '.join(EXTENSIONS)}")


class Images(Dataset):
    """Image files, read as RGB, the way up that their EXIF data says; of several frames, the first."""

    def __init__(
        self, samples: Sequence[tuple[Path, int]], transform: Callable[[Any], Tensor]
    ) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(_read_image(path)), label


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow lets through what damaged bytes raise in its decoders
        raise FastjacError(f"{path} is not a readable image: {first_line(error)}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8 bits; where Pillow would clip (16 bits, floats), by the range of its type."""
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = numpy.asarray(image)
        low, high = pixels.min(), pixels.max()
        most = 1 if image.mode == "F" else 65535  # Pillow reads some files of 16 bits as of 32
        if not (low >= 0 and high <= most):
            raise ValueError(
                f"its pixels (mode {image.mode}) are from {low} to {high}, expected 0 to {most}; "
                "save it rescaled"
            )
        image = Image.fromarray((pixels * (255 / most)).round().astype("uint8"))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns
    return image.convert("RGB")


def middle_crop(size: int) -> Callable[[Any], Tensor]:
    """The middle of an image, ``[3, size, size]`` float32 in [0, 1], as networks are evaluated on it."""
    from torchvision.transforms import v2

    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([v2.ToImage(), v2.Resize(size * 8 // 7), v2.CenterCrop(size), to_float])


def without_damaged(samples: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """The samples that can be read, all of which are tried; says how many are left out."""

    def damage(sample: tuple[Path, int]) -> str:
        try:
            _read_image(sample[0])
        except FastjacError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as threads:
        found = list(threads.map(damage, samples))
    if damaged := [text for text in found if text]:
        notice(f"{len(damaged)} of {len(samples)} images left out; {damaged[0]}")
    return [sample for sample, text in zip(samples, found, strict=True) if not text]
