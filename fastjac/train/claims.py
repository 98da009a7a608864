"""Who trains which run, where several processes, on several machines, share a folder."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastjac.errors import FastjacError, notice

POLL = 0.5  # seconds between looks at what other processes have claimed
LONG = 60  # seconds after which a line says what is waited for


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Have ``folder`` for this process alone; whether it has it, or another process does.

    The claim is the file ``<folder>.claim`` beside it, with host, process and time, which is made by one
    process only and removed at the end. That of a process of this host that is gone is taken over.
    """
    path = _path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = _make(path) or (_remove_if_stale(path) and _make(path))
    except OSError as error:
        raise FastjacError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield mine
    finally:
        if mine:
            path.unlink(missing_ok=True)


@contextmanager
def claim_in_turn(folder: Path) -> Iterator[None]:
    """Have ``folder`` for this process alone, once no other has it."""
    while True:
        with claim(folder) as mine:
            if mine:
                yield
                return
        wait_for(folder)


def wait_for(folder: Path) -> None:
    """Wait a moment for the process that has claimed ``folder``; of a long wait, say once for which."""
    path = _path(folder)
    about = _read(path)
    if about is not None and time.time() - about["time"] > LONG:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["time"]))
        notice(
            f"waiting for {folder.name}, which process {about['pid']} on {about['host']} has had since "
            f"{since}; if that is gone, remove {path}"
        )
    time.sleep(POLL)


def _path(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.claim"  # of "." and "/" too, which have no name


def _make(path: Path) -> bool:
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "time": time.time(),
    }
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        os.write(file, json.dumps(about).encode())
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(file)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """What a claim says; None if it is gone, or about to be written, or damaged."""
    try:
        about = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    kinds = {"host": str, "pid": int, "time": int | float}
    whole = isinstance(about, dict) and all(isinstance(about.get(k), kinds[k]) for k in kinds)
    return about if whole else None


def _is_stale(path: Path) -> bool:
    about = _read(path)
    if about is None:  # without a word for so long: its process was killed, or its disk full
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > LONG
        return False
    if about["host"] != socket.gethostname():
        return False
    try:
        os.kill(about["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return _start_of(about["pid"]) != about.get("started")


def _start_of(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: its number may have been another's before."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _remove_if_stale(path: Path) -> bool:
    """Remove a claim whose process is gone, one process of this host at a time."""
    if not _is_stale(path):
        return not path.exists()
    import fcntl

    lock_file = f"fastjac-claims-{os.getuid()}.lock"  # one of another user's could not be opened
    with (Path(tempfile.gettempdir()) / lock_file).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_stale(path):  # still: another may have taken it over meanwhile
            path.unlink(missing_ok=True)
    return True
