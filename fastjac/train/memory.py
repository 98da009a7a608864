"""An allocator that keeps its pages.

glibc gives every large block back to the system when it is freed, and the page faults of mapping
the next one cost a training step on the CPU more than its arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_pages() -> bool:
    """Have this process keep the memory it frees, for its own use; whether it can (glibc can)."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28))
    return all(mallopt(what, value) == 1 for what, value in settings)
