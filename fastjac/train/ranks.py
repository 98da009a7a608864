"""The processes of one run, as ``torchrun`` starts them: one, if it did not.

Where one goes wrong it says so in one line, and ends; the others find its connection closed, or are
ended by ``torchrun``, and are silent.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastjac.errors import FastjacError, TrainingFailed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LOST = "another process of the run has ended"

_store: Any = None
_SECONDS_TO_SAY = 30  # for which a process that goes wrong looks for the others


class Ended(KeyboardInterrupt):
    """``torchrun`` ends this process, since another has ended."""


def launched() -> bool:
    """Whether this process is one of several."""
    number, processes = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return _is_number(number) and _is_number(processes) and int(number) < int(processes) > 1


def check_environment() -> None:
    """Raise where whoever started this process set what ``torchrun`` sets, to what it would not."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    given = {name: os.environ[name] for name in _NUMBERS if name in os.environ}
    right = all(map(_is_number, given.values()))
    if not right or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise FastjacError(
            f"the environment has {found}; expected a RANK below WORLD_SIZE, as torchrun sets them, or "
            "neither"
        )


_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def count() -> int:
    """How many processes train this run."""
    return int(os.environ["WORLD_SIZE"]) if _joined() else 1


def rank() -> int:
    """Which of them this is."""
    return int(os.environ["RANK"]) if _joined() else 0


def is_first() -> bool:
    """Whether this one writes and prints."""
    return not launched() or int(os.environ["RANK"]) == 0


def local_rank() -> int | None:
    """Which of the processes of this machine, and so of its GPUs; None of a single process."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) if launched() else None


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Meet the other processes, by gloo, and between GPUs by NCCL, and part from them at the end."""
    if not launched():
        yield
        return
    _join(device)
    try:
        yield
    except RuntimeError as error:
        if lost_another(error):
            raise TrainingFailed(LOST) from error
        raise
    except Ended as error:
        raise TrainingFailed(LOST) from error
    import torch.distributed as dist

    global _store
    dist.barrier()  # what one still reads, another must not have closed
    dist.destroy_process_group()
    # All of it: threads that wait for a group kept alive here would end the interpreter by an abort.
    _store = None
    gc.collect()


def _join(device: torch.device) -> None:
    import torch.distributed as dist

    store, at = _connect(), device.type == "cuda"
    if at:
        import torch

        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if at else "gloo",
            store=dist.PrefixStore("group", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    except RuntimeError as error:
        raise FastjacError(f"the processes cannot meet: {_first_line(error)}") from error
    if not is_first():
        logging.getLogger("fastjac").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _end)
    told = sys.unraisablehook  # of what is raised while an object is deleted, too
    sys.unraisablehook = lambda it: None if isinstance(it.exc_value, Ended) else told(it)


def agree(about: dict[str, Any]) -> None:
    """Raise, on all processes, for the first of ``about`` that is not the same on all."""
    if not _joined():
        return
    import torch.distributed as dist

    mine = {
        name: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
        for name, value in about.items()
    }
    all_of_them: list[Any] = [None] * count()
    dist.all_gather_object(all_of_them, mine)
    for name in about:
        for other, theirs in enumerate(all_of_them):
            if theirs[name] != all_of_them[0][name]:
                raise FastjacError(
                    f"process {other} has other {name} than process 0; expected the same on all"
                )


def gather(value: Any) -> list[Any]:
    """``value`` of every process."""
    if not _joined():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def add_up(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over the processes, in its place."""
    if _joined():
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers: BatchNorm's running statistics."""
    if _joined():
        import torch.distributed as dist

        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def share_of(batch: list[Any]) -> list[Any]:
    """This process's part of a batch.

    Images that stand mirrored to one another stay together, since ``--mixup`` mixes those.
    """
    processes, at = count(), rank()
    if len(batch) % processes:
        raise FastjacError(
            f"{processes} processes cannot share a batch of {len(batch)} images evenly; expected a "
            f"--batch-size that is a multiple of {processes}, and as many images"
        )
    size = len(batch) // processes
    if size % 2:
        return batch[at * size : (at + 1) * size]
    half, end = size // 2, len(batch)
    return batch[at * half : (at + 1) * half] + batch[end - (at + 1) * half : end - at * half]


def lost_another(error: BaseException) -> bool:
    """Whether ``error`` says that another process has ended."""
    if not _joined():
        return False
    import torch.distributed as dist

    return isinstance(error, Ended | dist.DistError) or "gloo" in str(error)


def ignore_end() -> None:
    """From here on this process says what went wrong, which ``torchrun`` must not cut short."""
    if launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def fails_first() -> bool:
    """Whether no other process has said what went wrong, so that this one has to."""
    if not launched():
        return True
    ignore_end()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return _connect(_SECONDS_TO_SAY).add(f"failed in attempt {attempt}", 1) == 1
    except (FastjacError, RuntimeError):  # without the others there is nobody to be silent for
        return True


def _joined() -> bool:
    if _store is None or not launched():
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _connect(seconds: int = 1800) -> Any:
    """The store that the processes share, once they meet within that time."""
    global _store
    if _store is None:
        import torch.distributed as dist

        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        except (RuntimeError, ValueError) as error:
            raise FastjacError(
                f"the processes cannot meet at {where}: {_first_line(error)}"
            ) from error
        _store = dist.PrefixStore("fastjac", store)
    return _store


def _end(*_: Any) -> None:
    raise Ended


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
