"""What a teacher gives for an image, computed once and kept in a file.

A teacher is frozen, so its logits, attention maps, window positions and Jacobians depend on the image
and the label alone. Rows are looked up by a digest of both: an image that comes back (as it was, or
flipped) is found, and one that changed is another. The file is named by a digest of all else that
counts: the teacher's weights, the targets, the layers and PyTorch's version. It is an SQLite database,
read through a memory map, which several processes may share, and which survives being killed.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import FastjacError
from fastjac.errors import notice

FORMAT = 1
_MAP_BYTES = 1 << 34


def teacher_key(teacher: nn.Module, *settings: Any) -> str:
    """A digest of the teacher's state and of the settings (their ``repr``)."""
    digest = _digest_of(teacher)
    digest.update(repr((FORMAT, type(teacher).__name__, torch.__version__, settings)).encode())
    return digest.hexdigest()


def weights_key(model: nn.Module) -> str:
    """A digest of the model's state."""
    return _digest_of(model).hexdigest()


def _digest_of(model: nn.Module) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest


class TeacherCache:
    """Results of ``compute(x, y)``, a list of tensors ``[B, ...]``, looked up by image and label.

    Args:
        folder: made if it is missing; holds one file per ``key``. None: the rows are kept in memory.
        key: of :func:`teacher_key`.
        compute: the teacher; called with one image at a time, so that a row depends on no other image.

    A row whose checksum is wrong is computed anew, with a notice; so is a file that is no database of
    this format. Deterministic where ``compute`` is. Raises :class:`FastjacError` for a folder that
    cannot be written to.
    """

    def __init__(
        self, folder: Path | None, key: str, compute: Callable[[Tensor, Tensor], Sequence[Tensor]]
    ) -> None:
        self.compute = compute
        self.path = Path(":memory:") if folder is None else folder / f"{key}.sqlite"
        self._layout: list[tuple[torch.dtype, torch.Size]] | None = None
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except (OSError, sqlite3.DatabaseError) as error:
            raise FastjacError(
                f"--teacher-cache: {self.path} cannot be written: {error}; expected a folder that "
                "can be, or --teacher-cache off"
            ) from error

    def _open(self) -> sqlite3.Connection:
        for last in (False, True):
            file = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            try:
                file.execute("PRAGMA synchronous = NORMAL")
                file.execute(f"PRAGMA mmap_size = {_MAP_BYTES}")
                file.execute(
                    "CREATE TABLE IF NOT EXISTS teacher (image BLOB PRIMARY KEY, checksum BLOB, "
                    "value BLOB) WITHOUT ROWID"
                )
                file.execute("SELECT image, checksum, value FROM teacher LIMIT 1").fetchone()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                file.close()
                if last:
                    raise
                self._discard(error)
            else:
                return file
        raise AssertionError

    def _discard(self, error: Exception) -> None:
        notice(f"{self.path} is damaged ({error}); it is built anew")
        for end in ("", "-journal"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)

    def __call__(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The results for ``x`` ``[B, ...]`` with labels ``y`` ``[B]``, on x's device."""
        keys = _digests(x, y)
        rows = self._read(keys)
        missing = [i for i, row in enumerate(rows) if row is None]
        fresh: dict[bytes, bytes] = {}
        for i in missing or ([0] if self._layout is None else []):
            if keys[i] in fresh:
                continue
            results = [r.detach().cpu() for r in self.compute(x[i : i + 1], y[i : i + 1])]
            self._layout = [(r.dtype, r.shape[1:]) for r in results]
            fresh[keys[i]] = b"".join(map(_bytes, results))
        if missing:
            self._write(fresh)
        whole = [fresh.get(key, row) for key, row in zip(keys, rows, strict=True)]
        return [r.to(x.device) for r in self._tensors(whole)]

    def _tensors(self, rows: list[bytes]) -> list[Tensor]:
        sizes = [shape.numel() * dtype.itemsize for dtype, shape in self._layout]
        if any(len(row) != sum(sizes) for row in rows):
            raise FastjacError(
                f"{self.path} holds rows of another size than the teacher gives: delete it"
            )
        whole = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
        return [
            part.contiguous().view(dtype).view(len(rows), *shape)
            for part, (dtype, shape) in zip(whole.split(sizes, 1), self._layout, strict=True)
        ]

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        rows: list[bytes | None] = []
        damaged = 0
        try:
            for key in keys:
                found = self._file.execute(
                    "SELECT checksum, value FROM teacher WHERE image = ?", (key,)
                ).fetchone()
                row = None if found is None else found[1]
                whole = isinstance(row, bytes) and _checksum(key, row) == found[0]
                damaged += found is not None and not whole
                rows.append(row if whole else None)
        except sqlite3.OperationalError as error:
            raise FastjacError(f"--teacher-cache: {self.path} cannot be read: {error}") from error
        except sqlite3.DatabaseError as error:
            self._file.close()
            self._discard(error)
            self._file = self._open()
            return [None] * len(keys)
        if damaged:
            notice(f"{self.path} has damaged rows, which are computed anew")
        return rows

    def _write(self, rows: dict[bytes, bytes]) -> None:
        try:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany(
                "INSERT OR REPLACE INTO teacher VALUES (?, ?, ?)",
                [(key, _checksum(key, row), row) for key, row in rows.items()],
            )
            self._file.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise FastjacError(
                f"--teacher-cache: {self.path} cannot be written: {error}; expected space and a "
                "folder that can be written, or --teacher-cache off"
            ) from error


def _digests(x: Tensor, y: Tensor) -> list[bytes]:
    images, labels = x.detach().cpu().contiguous(), y.detach().cpu().contiguous()
    return [
        hashlib.blake2b(_bytes(image) + _bytes(label), digest_size=16).digest()
        for image, label in zip(images, labels, strict=True)
    ]


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=key, digest_size=8).digest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
