"""Ctrl-C, which a terminal sends to all processes of a run at once, is for the first of them alone."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader


@contextmanager
def put_off() -> Iterator[None]:
    """Put Ctrl-C off until the block ends; a process that is started meanwhile never gets it."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets it
        yield
        return
    came: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    # What is masked stays so in a process that is started; here another thread may take it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if came and callable(handler):
        handler(*came[0])


def read(loader: DataLoader) -> Iterator[Any]:
    """The batches of ``loader``, whose processes do not get Ctrl-C."""
    loader.worker_init_fn = _be_quiet
    with put_off():
        batches = iter(loader)
    yield from batches


def _be_quiet(worker: int) -> None:
    """What a thread of a loader's process has left to send is no news once the run has ended."""
    show = sys.excepthook

    def tell(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError):
            show(kind, error, trace)

    sys.excepthook = tell
