"""The error that says what was wrong with what the caller gave."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastjacError(ValueError):
    """Bad input: one line that names the thing, what was expected and what came."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> FastjacError:
    """The error for a name that is not one of ``known``, with the nearest right names.

    >>> str(unknown("layer", "layer9", ["layer1", "layer2"], where="the student"))
    "unknown layer 'layer9' in the student; nearest: 'layer2', 'layer1'"
    """
    candidates = [k for k in known if k]
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.4) or candidates[:8]
    place = f" in {where}" if where else ""
    return FastjacError(
        f"unknown {kind} {name!r}{place}; nearest: {', '.join(map(repr, near)) or 'none'}"
    )
