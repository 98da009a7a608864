"""A tensor's memory: copies, and notes of what neither versions nor autograd's graph tell."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastjac.errors import FastjacError


class MemoryNotes:
    """A number noted of the memory that a tensor shares with its views and aliases, while it lives."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._notes)

    def note(self, tensor: Tensor, number: int = 0) -> None:
        """Note a number; of a sparse or nested tensor, nothing."""
        if has_memory(tensor):
            memory = StorageWeakRef(tensor.untyped_storage())
            self._notes[memory.cdata] = memory, number

    def find(self, tensor: Tensor) -> int | None:
        """The number that was noted last; None: none."""
        if not has_memory(tensor):
            return None
        known = self._notes.get(tensor.untyped_storage()._cdata)
        return None if known is None or known[0].expired() else known[1]


class VersionNotes:
    """Tensors as they are: none that was overwritten since it was noted is among them."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[Any, int]] = {}

    def note(self, tensor: Tensor) -> None:
        """Note a tensor, while it lives."""
        notes, key = self._notes, id(tensor)
        notes[key] = weakref.ref(tensor, lambda _: notes.pop(key, None)), tensor._version

    def __contains__(self, tensor: Tensor) -> bool:
        known = self._notes.get(id(tensor))
        return known is not None and known[1] == tensor._version


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in one storage."""
    return tensor.layout == torch.strided and not tensor.is_nested


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one storage."""
    if not (has_memory(a) and has_memory(b)):
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def clone_on_write(leaf: Tensor) -> Tensor:
    """A copy whose memory is its own from the first write on."""
    if leaf.layout != torch.strided or leaf.is_meta:
        kind = "a meta tensor" if leaf.is_meta else "sparse"
        raise FastjacError(f"x: expected a dense tensor with values, got one that is {kind}")
    if torch._debug_has_internal_overlap(leaf):  # expanded, say: no model could write to it
        return leaf.clone()
    try:
        return torch._lazy_clone(leaf)
    except (RuntimeError, TypeError):
        # Memory of another allocator (numpy's, or shared with a loader's worker), or a subclass.
        return leaf.clone()
