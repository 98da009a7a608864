"""The Jacobian: from the target's scalar down to the input, on full maps or on crops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastjac.engine.crops import Crops, narrow, widen
from fastjac.engine.forward import Tape
from fastjac.engine.record import NotLocalError, Record
from fastjac.errors import FastjacError
from fastjac.ops.attention_window import attention_window_slope
from fastjac.ops.window_crop import window_crop_adjoint
from fastjac.support import Region
from fastjac.targets import AttentionWindow, LabelLogit, Target


@dataclass
class Frame:
    """Where the passes run: on crops, each node's of one region. Maps have no frame."""

    crops: Crops
    regions: dict[fx.Node, Region]
    sizes: dict[fx.Node, tuple[int, int]]

    def read(self, node: fx.Node, edge: Region, value: Tensor) -> Tensor:
        """The part of ``node``'s crop that a reader sees."""
        return narrow(value, self.regions[node], edge)

    def write(self, node: fx.Node, edge: Region, value: Tensor) -> Tensor:
        """The adjoint of :meth:`read`."""
        return widen(value, edge, self.regions[node])

    def inside(self, node: fx.Node, value: Tensor) -> Tensor:
        """``value`` with zeros where the node's crop reaches outside its map."""
        return self.crops.inside(value, self.regions[node], self.sizes[node])


@dataclass
class Pulled:
    """J of one network, on full maps or as the crop that holds all of its support."""

    values: Tensor
    shape: torch.Size
    frame: Frame | None
    region: Region | None
    records: dict[fx.Node, Record]
    seed: Callable[[Tensor], Tensor]

    def full(self) -> Tensor:
        """J, of the input's shape."""
        if self.frame is None:
            return self.values
        return self.frame.crops.scatter(self.values, self.region, self.shape[2:])


def in_common(a: Pulled, b: Pulled) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Two Jacobians over the same pixels, and the way back from those pixels to ``a.values``.

    Crops that move together are compared as crops, over their hull; others on the whole input.
    """
    if a.frame is not None and b.frame is not None:
        together = a.frame.crops.position is b.frame.crops.position
        if together and a.region.scales == b.region.scales:
            hull = a.region.hull(b.region)
            values = (widen(p.values, p.region, hull) for p in (a, b))
            return *values, lambda v: narrow(v, hull, a.region)
    if a.frame is None:
        return a.values, b.full(), lambda v: v
    return a.full(), b.full(), lambda v: a.frame.crops.gather(v, a.region)


def pullback(
    tape: Tape, target: Target, y: Tensor | None, position: Tensor | None, strategy: str
) -> Pulled:
    """J = d(sum of phi)/dx. Uses the tape up: what the pushforward needs is in the result."""
    records, tape.records = tape.records, {}
    for record in records.values():
        record.check()
    frame = None
    if strategy == "local" and isinstance(target, LabelLogit):
        raise _not_local(NotLocalError("the label's logit"))
    if strategy != "dense" and isinstance(target, AttentionWindow):
        parts = _taken_apart(records)
        frame = _frame(tape, parts, target, position, strategy)
        records = records if frame is None else parts
    seed, curvature = _seed(tape, target, y, position, frame)
    if frame is not None:
        records = _cropped(records, frame)
        frame.crops.forget()
    _link(records)
    delta = _down(tape, records, seed, frame)
    region = None if frame is None else frame.regions[tape.program.input]
    return Pulled(delta, tape.shape, frame, region, records, curvature)


def _seed(
    tape: Tape, target: Target, y: Tensor | None, position: Tensor | None, frame: Frame | None
) -> tuple[Tensor, Callable[[Tensor], Tensor | None]]:
    """d phi / d(the target's node), and the curvature of phi for a tangent of it."""
    if isinstance(target, LabelLogit):
        target.check(tape.logits, y)
        seed = torch.zeros_like(tape.logits.detach()).scatter_(1, y[:, None], 1)
        return seed, lambda tangent: None
    z = tape.features.detach()
    slope, bend = attention_window_slope(z, position, target.side(z), target.power)
    if frame is None:
        slope, bend = (window_crop_adjoint(v, position, z.shape[2:]) for v in (slope, bend))
    return slope, lambda tangent: bend * tangent


def _frame(
    tape: Tape,
    records: dict[fx.Node, Record],
    target: AttentionWindow,
    position: Tensor,
    strategy: str,
) -> Frame | None:
    """The crops that the window sees; None where ``strategy="auto"`` finds maps the better choice."""
    try:
        regions = _regions(tape, records, target)
        if tape.program.input not in regions or len(tape.shape) != 4:
            raise NotLocalError("the input is no image [B, C, H, W]")
    except NotLocalError as reason:
        if strategy == "local":
            raise _not_local(reason) from None
        return None
    height, width = tape.shape[2:]
    region = regions[tape.program.input]
    if strategy == "auto" and 2 * region.area >= height * width:
        return None
    k = target.side(tape.features)
    h, w = tape.features.shape[2:]
    sizes = {node: tuple(record.size) for node, record in records.items() if node in regions}
    sizes[tape.program.input] = (height, width)
    return Frame(Crops(position, (h - k + 1, w - k + 1)), regions, sizes)


def _not_local(reason: NotLocalError) -> FastjacError:
    return FastjacError(f"strategy='local' needs a target with local support; global: {reason}")


def _regions(
    tape: Tape, records: dict[fx.Node, Record], target: AttentionWindow
) -> dict[fx.Node, Region]:
    """The region of every node that the window sees, from the window down to the input."""
    regions = {tape.target: Region.window(target.side(tape.features))}
    for node, record in reversed(records.items()):
        if node not in regions:
            continue
        if record.size is None:
            raise record.not_local("its output is not a feature map")
        record.edge_regions = record.rule.edges(record, regions[node])
        for source, edge in zip(record.inputs, record.edge_regions, strict=True):
            try:
                regions[source] = edge.hull(regions[source]) if source in regions else edge
            except ValueError as err:
                raise record.not_local(str(err)) from None
    return regions


def _taken_apart(records: dict[fx.Node, Record]) -> dict[fx.Node, Record]:
    """Records of single operations, as crops have them."""
    single: dict[fx.Node, Record] = {}
    for record in records.values():
        single.update(record.rule.parts(record))
    return single


def _cropped(records: dict[fx.Node, Record], frame: Frame) -> dict[fx.Node, Record]:
    crops, cropped = frame.crops, {}
    for node, record in records.items():
        if node in frame.regions:
            cropped[node] = record.rule.crop(record, crops, frame.regions[node])
            if cropped[node].differentiable:
                cropped[node].spread = _spread(crops, record)
    return cropped


def _spread(crops: Crops, record: Record) -> Callable[[Tensor], Tensor]:
    region, size = record.edge_regions[0], record.size
    start = crops.start(region)
    return lambda crop: window_crop_adjoint(crop, start, size)


def _link(records: dict[fx.Node, Record]) -> None:
    """Tell a record whose output only one other reads, which that is."""
    readers: dict[fx.Node, list[Record]] = {}
    for record in records.values():
        for source in record.inputs:
            readers.setdefault(source, []).append(record)
    for node, record in records.items():
        if len(readers.get(node, ())) == 1:
            record.sole_reader = readers[node][0]


def _down(tape: Tape, records: dict[fx.Node, Record], seed: Tensor, frame: Frame | None) -> Tensor:
    deltas: dict[fx.Node, Any] = {tape.target: seed}
    for node, record in list(reversed(records.items())):
        delta = deltas.pop(node, None)
        if delta is None:  # a value that the target's does not come from
            del records[node]
            continue
        if frame is not None:
            delta = frame.inside(node, delta)
        rule = record.rule
        cotangents = rule.pullback(record, delta)
        if not record.differentiable:
            del records[node]
        elif rule.needs_delta(record) and not _recomputes(record):
            record.delta = delta
        for i, (source, cotangent) in enumerate(zip(record.inputs, cotangents, strict=True)):
            if frame is not None:
                cotangent = frame.write(source, record.edge_regions[i], cotangent)
            deltas[source] = _plus(deltas.get(source), cotangent)
        del delta, cotangents
    result = deltas[tape.program.input]
    return result if frame is None else frame.inside(tape.program.input, result)


def _recomputes(record: Record) -> bool:
    """Whether the only reader can give the cotangent of this output again (BatchNorm can)."""
    reader = record.sole_reader
    return (
        reader is not None
        and hasattr(reader.rule, "input_delta")
        and reader.inputs[0] is record.node
    )


def _plus(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, list):
        return [_plus(x, y) for x, y in zip(a, b, strict=True)]
    return a + b
