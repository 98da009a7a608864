"""Image files: which of a folder's they are, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
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
    "ehthumbs.db", "desktop.ini", "lost+found", "@recycle", "@tmp", "#snapshot", "~snapshot",
    "__pycache__",
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
    """What lies in ``folder`` and below; links are followed, but not to a folder above.

    Raises :class:`FastjacError` for a folder that cannot be read.
    """
    found = Listing()
    _list(folder, found, (os.path.realpath(folder),))
    return found


def _list(folder: Path, found: Listing, above: tuple[str, ...]) -> None:
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: (_is_folder(entry), entry.name))
    except OSError as error:
        raise FastjacError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in inside:
        path = folder / entry.name
        if is_hidden(entry.name):
            found.hidden.append(path)
        elif _is_folder(entry):
            real = os.path.realpath(path)
            if not any(Path(each).is_relative_to(real) for each in above):
                _list(path, found, (*above, real))
        # A link to a file that is gone is an image that cannot be read.
        elif path.suffix.lower() in EXTENSIONS and (path.is_file() or not path.exists()):
            found.images.append(path)
        else:
            found.others.append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to one another: a file that cannot be read
        return False


def no_image(folder: Path) -> FastjacError:
    """The error for a folder without images."""
    return FastjacError(f"{folder} has no image; images end in {', '.join(EXTENSIONS)}")


SKIP_DAMAGED = "; --skip-damaged leaves out what cannot be read"


class Images(Dataset):
    """Image files, read as RGB, the way up that their EXIF data says; of several frames, the first.

    ``advice`` ends the error for an image that cannot be read.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        transform: Callable[[Any], Tensor],
        advice: str = "",
    ) -> None:
        self.samples, self.transform, self.advice = samples, transform, advice

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            image = read_image(path)
        except FastjacError as error:
            raise FastjacError(f"{error}{self.advice}") from error
        return self.transform(image), label


def read_image(path: str | Path) -> Image.Image:
    """The image in a file, as the trainer reads it: in RGB, 8 bits, the way up that its EXIF data says.

    Of several frames it is the first. Raises :class:`FastjacError` for what is no image, and for one
    that 8 bits cannot hold, such as floats beyond 1.

    Example:
        >>> from sklearn.datasets import load_sample_images
        >>> read_image(load_sample_images().filenames[0]).size
        (640, 427)
    """
    try:
        with Image.open(path) as image:
            if image.format == "PNG":  # whose checksums the decoder does not compare
                with Image.open(path) as same:
                    same.verify()
            tags = getattr(image, "tag_v2", {})  # of a TIFF file
            return _as_rgb(ImageOps.exif_transpose(image), tags, Path(path))
    except Exception as error:  # Pillow lets through what damaged bytes raise in its decoders
        name = str(path).replace("\n", "\\n").replace("\r", "\\r")  # an error is one line
        raise FastjacError(f"{name} is not a readable image: {first_line(error)}") from error


def _as_rgb(image: Image.Image, tags: Mapping[int, Any], path: Path) -> Image.Image:
    """``image`` in 8 bits; where Pillow would clip (16 bits, floats), by the range of its type."""
    # Resized by its short side, a long strip would fill the memory.
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(
            f"it has {image.width} x {image.height} pixels; expected an aspect ratio of at most "
            f"{_MAX_ASPECT_RATIO}"
        )
    signed = 2 in _numbers(tags, _SAMPLE_FORMAT)
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = numpy.asarray(image)
        low, high = pixels.min(), pixels.max()
        (bits,) = _numbers(tags, _BITS_PER_SAMPLE)[:1] or (16,)
        bits = 16 if bits > 16 else bits - signed  # Pillow reads some files of 16 bits as of 32
        most = 1 if image.mode == "F" else 2**bits - 1
        if not (low >= 0 and high <= most):
            raise ValueError(
                f"its pixels (mode {image.mode}) are from {low} to {high}, expected 0 to {most}; "
                "save it rescaled"
            )
        if image.mode != "F" and 0 < high < 4096 <= most:
            _tell_dark(path, int(high), most)
        if tags.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow heeds in 8 bits alone
            pixels = most - pixels.astype("float64")
        image = Image.fromarray((pixels * (255 / most)).round().astype("uint8"))
    elif signed:
        raise ValueError("its pixels are signed bytes; save it rescaled to 0 to 255")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns
    return image.convert("RGB")


_MAX_ASPECT_RATIO = 1000
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


def _numbers(tags: Mapping[int, Any], tag: int) -> tuple[int, ...]:
    value = tags.get(tag, ())
    return value if isinstance(value, tuple) else (value,)


_told_dark: list[Path] = []


def _tell_dark(path: Path, high: int, most: int) -> None:
    """Say of the first image alone that it may be of fewer bits than its file."""
    if not _told_dark:
        _told_dark.append(path)
        notice(
            f"{path}: its brightest pixel is {high} of {most}, nearly black; if that is its white, save "
            "it and its like rescaled"
        )


def middle_crop(size: int) -> Callable[[Any], Tensor]:
    """The middle of an image, ``[3, size, size]`` float32 in [0, 1], as networks are evaluated on it."""
    from torchvision.transforms import v2

    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([v2.ToImage(), v2.Resize(size * 8 // 7), v2.CenterCrop(size), to_float])


def without_damaged(samples: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """The samples that can be read, all of which are tried; says how many are left out."""

    def damage(sample: tuple[Path, int]) -> str:
        try:
            read_image(sample[0])
        except FastjacError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as threads:
        found = list(threads.map(damage, samples))
    if damaged := [text for text in found if text]:
        notice(f"{len(damaged)} of {len(samples)} images left out; {damaged[0]}")
    return [sample for sample, text in zip(samples, found, strict=True) if not text]
