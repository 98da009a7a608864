"""The error that says what was wrong with what the caller gave, and the line that says what was done.

It needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any


class FastjacError(ValueError):
    """Bad input: one line that names the thing, what was expected and what came."""


class TrainingFailed(RuntimeError):
    """The training itself went wrong, with nothing wrong in what was asked for."""


def unknown(kind: str, name: object, known: Iterable[str], where: str = "") -> FastjacError:
    """The error for a name that is not one of ``known``, with the nearest right names.

    >>> str(unknown("layer", "layer9", ["layer1", "layer2"], where="the student"))
    "unknown layer 'layer9' in the student; nearest: 'layer2', 'layer1'"
    """
    candidates = [k for k in known if k]
    near = difflib.get_close_matches(str(name), candidates, n=3, cutoff=0.4) or candidates[:8]
    place = f" in {where}" if where else ""
    return FastjacError(
        f"unknown {kind} {name!r}{place}; nearest: {', '.join(map(repr, near)) or 'none'}"
    )


def is_int(value: object) -> bool:
    """Whether it is an int of Python or NumPy; a bool, of a mask say, is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_int(name: str, value: Any, least: int) -> int:
    """``value`` as an int; raises unless it is one, and at least ``least``."""
    if not is_int(value):
        raise FastjacError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise FastjacError(f"{name}: expected {least} or more, got {value}")
    return int(value)


def existing_file(path: str | Path, expected: str = "weights (.safetensors, .pth or .pt)") -> Path:
    """``path``; raises if there is no such file. ``expected`` says what should be in it."""
    path = Path(path)
    if is_dir(path):
        raise FastjacError(f"{path} is a folder; expected the file of {expected}")
    if not is_file(path):
        raise FastjacError(f"{path}: no such file; expected {expected}")
    return path


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; raises where the system cannot tell, as of a name too long."""
    return _is(Path.is_file, path)


def is_dir(path: str | Path) -> bool:
    """Whether there is such a folder; raises as :func:`is_file` does."""
    return _is(Path.is_dir, path)


def _is(kind: Callable[[Path], bool], path: str | Path) -> bool:
    try:
        return kind(Path(path))
    except OSError as error:
        raise FastjacError(f"{path} cannot be looked up: {error.strerror}") from error


def read_text(path: str | Path) -> str:
    """The text in a file that the user gave; raises if it cannot be read, or is not UTF-8.

    Without the mark at its start (U+FEFF) that some editors put there.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise FastjacError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FastjacError(
            f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}; "
            "save it as UTF-8"
        ) from error


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Tell what cannot be read in the block as the user's files, by name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise FastjacError(f"{error.filename} cannot be read: {error.strerror}") from error


@functools.cache
def notice(text: str) -> None:
    """Log ``text`` as a warning, once per process; without any logging set up, a line on stderr."""
    logging.getLogger("fastjac").warning("fastjac: %s", text)


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says; its class, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
