"""Which options, if they differ, make another run of the one that is resumed."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from typing import Any

from fastjac.errors import notice
from fastjac.train.options import LIBRARIES, StudentOptions, flag

# These may differ between a run and its resumption: they say where and how, not what.
ELSEWHERE = {
    "config", "data_dir", "download", "device", "workers", "threads", "output", "experiment",
    "resume", "tensorboard", "jobs", "ignore_head", "skip_damaged", "title", "teacher_cache",
    "checkpoint_steps", "keep_checkpoints", "micro_batch",
}  # fmt: skip
# Of these, whether they are given says what, and the place says where.
_FOLDERS = {"unlabelled"}
# These may have moved, with the folder that they are in.
_SOURCES = {"teacher", "teacher_weights", "weights"}


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The options that would make another run of it, as ``--lr (was 0.1, now 0.2)``.

    An option that is newer than the run ``before`` was at its default then.
    """
    defaults = {f.name: f.default for f in fields(StudentOptions) if f.default is not MISSING}
    before = {name: value for name, value in defaults.items() if name in now} | before
    free = ELSEWHERE | ({"epochs"} if now.get("sched") != "cosine" else set())
    return [
        f"{flag(k)} (was {before.get(k)}, now {now.get(k)})"
        for k in {**now, **before}
        if k not in free
        and before.get(k) != now.get(k)
        and not (k in _FOLDERS and before.get(k) and now.get(k))
        and not (k in _SOURCES and _moved(k, before.get(k), now.get(k)))
    ]


def _moved(name: str, before: Any, now: Any) -> bool:
    """Whether the path ``before`` is gone, and ``now`` ends in the same two names; says so."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    if os.path.exists(before):  # what the run began with is still there: this is another
        return os.path.realpath(before) == os.path.realpath(now)
    ends = [os.path.abspath(path).split(os.sep)[-2:] for path in (before, now)]
    if ends[0] != ends[1] or before.startswith(LIBRARIES) or now.startswith(LIBRARIES):
        return False
    if os.path.abspath(before) != os.path.abspath(now):
        notice(f"{flag(name)} {now} is taken for {before}, which the run began with")
    return True
