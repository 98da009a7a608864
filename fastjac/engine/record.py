"""What the passes hand to one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastjac.errors import FastjacError
from fastjac.graph import describe
from fastjac.support import Region, Window


class NotLocalError(Exception):
    """A node whose outputs see the whole input; carries the node's description."""


def compute_type(tensor: Tensor) -> torch.dtype:
    """What sums over ``tensor`` are accumulated in: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Record:
    """One node's part in one step: what its rule kept of the forward, and its cotangent.

    ``inputs`` are the nodes that its derivative goes to. A rule sets further attributes of its own;
    the tensors among them that a later operation could overwrite go through :meth:`keep`.
    """

    def __init__(self, node: fx.Node, rule: Any, batch_stats: str, differentiable: bool) -> None:
        self.node = node
        self.rule = rule
        self.batch_stats = batch_stats
        self.differentiable = differentiable
        self.inputs: tuple[fx.Node, ...] = ()
        self.delta: Any = None
        self.sole_reader: Record | None = None
        self.spread: Spread | None = None
        self._versions: list[tuple[Tensor, int]] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor``, noting its version, so that :meth:`check` sees whether it was overwritten."""
        if not tensor.is_inference():
            self._versions.append((tensor, tensor._version))
        return tensor

    def check(self) -> None:
        """Raise if an in-place operation changed what the rule kept."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise FastjacError(
                f"a value that {describe(self.node)} needs for its derivative was overwritten in "
                "place by a later operation; use the operation that is not in place"
            )

    def curve(self, sink: Sink, tensor: Tensor, cotangent: Tensor) -> None:
        """Sink a curvature cotangent to ``tensor``, an input of the node (on crops: its crop)."""
        sink.add(tensor, cotangent, self.spread)

    def not_local(self, why: str) -> NotLocalError:
        return NotLocalError(f"{describe(self.node)}: {why}")

    def on_crops(self, **values: Any) -> Record:
        """A record of the same node that holds crops: ``values`` replace what differs."""
        record = Record(self.node, self.rule, self.batch_stats, self.differentiable)
        record.__dict__.update({**self.__dict__, **values, "_versions": []})
        return record


class Sink:
    """Where the pushforward leaves gradients: tensors of the student's autograd graph, and theirs."""

    def __init__(self) -> None:
        self.entries: list[tuple[Tensor, Tensor, Spread | None]] = []
        self._index: dict[int, int] = {}

    def add(self, tensor: Tensor, gradient: Tensor, spread: Spread | None = None) -> None:
        """Add ``gradient`` to what ``tensor`` gets; a tensor without a graph gets nothing.

        ``spread`` makes a gradient of ``tensor``'s shape of one that is a crop, when it is needed.
        """
        if not tensor.requires_grad:
            return
        gradient = gradient.to(tensor.dtype)
        at = self._index.setdefault(id(tensor), len(self.entries)) if spread is None else -1
        if spread is not None or at == len(self.entries):
            self.entries.append((tensor, gradient, spread))
        else:
            self.entries[at] = (tensor, self.entries[at][1] + gradient, None)


Spread = Callable[[Tensor], Tensor]
Windows = tuple[Window, Window]
Edges = list[Region]
