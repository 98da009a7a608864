"""Functions of PyTorch's that a user has replaced in their module: ``F.softmax = scaled_softmax``.

PyTorch's functions in Python tell a mode their name's value, which is then the replacement, though it is
the original that a replacement has called. A mode that ran what it is told would run the replacement
twice.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function

_ASKS = handle_torch_function.__code__
_ORIGINALS = {f.__code__: f for f in vars(F).values() if type(f) is types.FunctionType}


def original(function: Any) -> Any:
    """The function that asks a mode: ``function``, or PyTorch's, where that is what a user replaced.

    For a mode's ``__torch_function__`` itself to call.
    """
    if torch.compiler.is_dynamo_compiling():  # which looks into no frame
        return function
    asks = sys._getframe(2)
    asker = asks.f_back
    if asks.f_code is not _ASKS or asker is None or not _is_pytorchs(asker.f_globals):
        return function
    code = asker.f_code
    if code is getattr(function, "__code__", None) or _is_pytorchs(_globals(function)):
        return function
    known = _ORIGINALS.get(code)
    return types.FunctionType(code, asker.f_globals) if known is None else known


def _is_pytorchs(names: dict[str, Any]) -> bool:
    return str(names.get("__name__")).partition(".")[0] == "torch"


def _globals(function: Any) -> dict[str, Any]:
    """The names of the module that a function, or a callable's class, is of."""
    names: dict[str, Any] | None = getattr(function, "__globals__", None)
    return {"__name__": type(function).__module__} if names is None else names
