"""Files that are whole or absent, and the folder of a run."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from fastjac.errors import FastjacError, TrainingFailed, is_dir, read_text


class CannotWrite(TrainingFailed):
    """A file could not be written, on a full disk for one; the one before it is as it was."""


@contextmanager
def replacing(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A path to write to; when the block ends well, the file moves to ``path`` in one step.

    It is on the disk by then, so that a power cut finds the old file or the new one, whole.
    ``before`` is called before the move. Raises :class:`CannotWrite` for an error of the system.
    """
    draft = _draft(path)
    try:
        yield draft
        _to_disk(draft)
        before()
        os.replace(draft, path)
        _to_disk(path.parent)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # no longer there, or a folder
            draft.unlink()


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _to_disk(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step."""
    with replacing(path) as draft:
        draft.write_text(text, "utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises for one that cannot be read."""
    try:
        return json.loads(read_text(path))
    except FastjacError:
        raise
    except (ValueError, RecursionError) as error:
        raise FastjacError(f"{path} is not JSON: {error}") from error


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace ``path`` by a table of ``rows``; the columns are all their keys."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class RunFolder:
    """``<output>/<experiment>``: everything that a run leaves behind.

    ``args.yaml`` (its options), ``subset.json`` (which images, where not all), ``last.pt`` and
    ``best.pt`` (the full state), the checkpoints before ``last.pt`` (``last-1.pt``, ...),
    ``metrics.jsonl`` and ``summary.csv`` (an epoch per line), and at the end ``model.safetensors``
    (the last epoch's weights, or their average) with ``config.json``.
    """

    def __init__(self, output: str | Path, experiment: str) -> None:
        self.path = Path(output) / experiment
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"
        self._lock: int | None = None

    def checkpoints(self) -> list[Path]:
        """``last.pt`` and those before it, as far as they exist, the newest first."""
        if not is_dir(self.path):
            return []
        older = sorted(
            (path for path in self.path.glob("last-*.pt") if path.stem[5:].isdecimal()), key=_age
        )
        return [path for path in (self.last, *older) if path.is_file()]

    def check(self) -> None:
        """Raise if a folder lies where a file of the run goes."""
        texts = ("args.yaml", "subset.json", "metrics.jsonl", "summary.csv")
        names = (*texts, "last.pt", "best.pt", "model.safetensors", "config.json")
        for path in (*(self.path / name for name in names), *self.path.glob("last-*.pt")):
            for place in (path, _draft(path)):
                if is_dir(place):
                    raise FastjacError(f"{place} is a folder; expected a file or nothing")

    def finished(self) -> bool:
        """Whether the run got to its end."""
        return (self.path / "config.json").is_file()

    def unfinish(self) -> None:
        """Take away the mark of an end: the run goes on."""
        (self.path / "config.json").unlink(missing_ok=True)

    def open(self, options: dict[str, Any]) -> None:
        """Make the folder and write ``args.yaml``."""
        self.make()
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        write_text(self.path / "args.yaml", text)

    def make(self) -> None:
        """Make the folder."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastjacError(f"{self.path} cannot be made: {error.strerror}") from error

    def lock(self) -> None:
        """Make the folder, for this process alone until :meth:`close`; raise if another has it.

        The system undoes the lock when the process ends, however it does.
        """
        import fcntl

        self.make()
        path = self.path / ".lock"
        for _ in range(100):  # more only where files change their identity: no locks there either
            try:
                lock = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
            except OSError:
                return  # a folder that cannot be written to is found when args.yaml is written
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # the file system has no locks
                raise FastjacError(
                    f"another process trains in {self.path}; wait for its end, or name another folder "
                    "by --experiment"
                ) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    self._lock = lock
                    return
            os.close(lock)  # of a process that has ended since, and removed the file

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / ".lock").unlink()
            os.close(self._lock)
            self._lock = None

    def save_state(self, state: dict[str, Any], best: bool, keep: int) -> None:
        """Write ``last.pt``, ``best.pt`` if it is that, and the metrics of ``state["history"]``.

        Of the checkpoints before, ``keep - 1`` stay.
        """
        for path in (self.best, self.last) if best else (self.last,):
            rotate = {} if path is self.best else {"before": lambda: self._rotate(keep)}
            with replacing(path, **rotate) as draft:
                _save(state, draft)
        self.write_metrics(state["history"])

    def promote(self, path: Path) -> None:
        """Make the checkpoint ``path`` the last one, in the place of any newer, which cannot be read."""
        for newer in self.checkpoints():
            if newer == path:
                break
            newer.unlink()
        if path != self.last:
            os.replace(path, self.last)

    def _rotate(self, keep: int) -> None:
        """Make room for a new ``last.pt``, which is there at any time all the same."""
        for path in reversed(self.checkpoints()):
            age = _age(path) + 1
            place = self.path / f"last-{age}.pt"
            if path != self.last:
                path.unlink() if age >= keep else os.replace(path, place)
            elif age < keep:
                try:
                    os.link(path, place)
                except OSError:  # a file system without hard links
                    os.replace(path, place)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl`` and ``summary.csv``."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history))
        write_csv(self.path / "summary.csv", history)

    def save_subset(self, subset: dict[str, Any]) -> None:
        """Write ``subset.json``."""
        write_text(self.path / "subset.json", json.dumps(subset) + "\n")

    def save_model(self, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        """Write ``model.safetensors``; then ``config.json``, which marks the run as finished."""
        from safetensors.torch import save

        with replacing(self.path / "model.safetensors") as draft:
            draft.write_bytes(save({k: v.contiguous() for k, v in weights.items()}))
        write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")


def _age(checkpoint: Path) -> int:
    """The number in its name: 0 of ``last.pt``, 1 of ``last-1.pt``."""
    return int(checkpoint.stem[5:] or 0)


class SeenFolder(RunFolder):
    """The folder as the processes of a run see it that do not write."""

    def lock(self) -> None:
        """Nothing."""

    def unfinish(self) -> None:
        """Nothing."""

    def open(self, options: dict[str, Any]) -> None:
        """Nothing."""

    def save_state(self, state: dict[str, Any], best: bool, keep: int) -> None:
        """Nothing."""

    def promote(self, path: Path) -> None:
        """Nothing."""

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Nothing."""

    def save_subset(self, subset: dict[str, Any]) -> None:
        """Nothing."""

    def save_model(self, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        """Nothing."""


def _save(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, which hides an error of the system behind one of its own."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
