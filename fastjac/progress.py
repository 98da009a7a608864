"""Progress on the standard error: a bar on a terminal, a line now and then elsewhere, as in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between lines, and before the first


class _Lines:
    """A file that makes lines of what tqdm draws."""

    def __init__(self) -> None:
        self.due = time.monotonic() + LINE_EVERY

    def write(self, text: str) -> None:
        """Show ``text`` if it is time for a line."""
        now = time.monotonic()
        if now < self.due or not (text := text.strip()):
            return
        self.due = now + LINE_EVERY
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more: go on
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing: each line is flushed."""


def progress_bar(what: Iterable[Any] | None = None, shown: bool = True, **settings: Any) -> tqdm:
    """``tqdm(what, **settings)``; it shows nothing if it is not to be ``shown``."""
    # The standard error is None in a process that was started without.
    if not shown or sys.stderr is None:
        return tqdm(what, disable=True, **settings)
    if sys.stderr.isatty():
        return tqdm(what, dynamic_ncols=True, **settings)
    words = "{desc}: {n_fmt} of {total_fmt} {unit}s [{elapsed}<{remaining}{postfix}]"
    return tqdm(what, file=_Lines(), bar_format=words, **settings)
