"""Progress bars on the standard error, where there is one and it is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(what: Iterable[Any] | None = None, shown: bool = True, **settings: Any) -> tqdm:
    """``tqdm(what, **settings)``; it shows nothing if it is not to be ``shown``."""
    possible = shown and sys.stderr is not None  # it is None in a process that was started without
    hidden = None if possible else True  # None: unless it is a terminal
    return tqdm(what, dynamic_ncols=True, disable=hidden, **settings)
