"""What a rule is.

For y = f(x; w), with delta the cotangent of y in the pullback of phi and x' (``tangents``) the tangent
of x in the pushforward of v: a pullback gives the cotangent of x; a pushforward gives y', and sinks
the gradient of <delta, y'> with respect to w and, for a nonlinear f, to x: the curvature.
DESIGN's table has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fastjac.engine.crops import Crops
from fastjac.engine.record import Edges, Record, Sink
from fastjac.support import Region


class Rule:
    """How one kind of node is differentiated. Stateless: what a step needs is in its record."""

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        """Whether the rule covers this call; ``varying`` are the arguments that depend on x."""
        return varying == {0}

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the node as PyTorch does, keeping what the passes need."""
        return call(*args, **kwargs)

    def needs_delta(self, record: Record) -> bool:
        """Whether the pushforward reads the cotangent of the node's output."""
        return False

    def pullback(self, record: Record, delta: Any) -> list[Any]:
        """The cotangent of each of ``record.inputs``."""
        raise NotImplementedError(type(self).__name__)

    def pushforward(self, record: Record, tangents: list[Any], delta: Any, sink: Sink) -> Any:
        """The tangent of the output."""
        raise NotImplementedError(type(self).__name__)

    def edges(self, record: Record, region: Region) -> Edges:
        """The region of each input that ``region`` of the output sees. Default: global."""
        raise record.not_local("its output sees the whole of its input")

    def parts(self, record: Record) -> dict[fx.Node, Record]:
        """The records of the single operations that the node stands for."""
        return {record.node: record}

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        """The record on crops, for an output of ``region``."""
        return record.on_crops()


class Pointwise(Rule):
    """A rule whose output at a pixel sees the same pixel of each input."""

    def edges(self, record: Record, region: Region) -> Edges:
        return [region] * len(record.inputs)
