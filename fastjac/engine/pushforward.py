"""The derivative of <v, J> in the parameters: tangents from the input up, with v as the input's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastjac.engine.backward import Deliver
from fastjac.engine.forward import Tape
from fastjac.engine.pullback import Pulled
from fastjac.engine.record import Record, Sink


def pushforward(tape: Tape, pulled: Pulled, v: Tensor, loss: Tensor) -> Tensor:
    """``loss``, differentiable: v is its derivative in J (``pulled.values``), held constant here.

    Uses ``pulled`` up.
    """
    sink = Sink()
    with torch.no_grad():
        tangent = _up(tape, pulled, v, sink)
        if tangent is not None and tape.features is not None:
            curvature = pulled.seed(tangent)
            frame = pulled.frame
            if frame is not None:
                region = frame.regions[tape.target]
                curvature = frame.crops.scatter(curvature, region, tape.features.shape[2:])
            sink.add(tape.features, curvature)
    for tensor, gradient, spread in sink.entries:
        loss = Deliver.apply(loss, tensor, gradient, spread)
    return loss


def _up(tape: Tape, pulled: Pulled, v: Tensor, sink: Sink) -> Any:
    records, frame = pulled.records, pulled.frame
    last: dict[fx.Node, fx.Node] = {}
    for node, record in records.items():
        last.update(dict.fromkeys(record.inputs, node))
    tangents: dict[fx.Node, Any] = {tape.program.input: v}
    for node in list(records):
        record = records.pop(node)
        given = [tangents[source] for source in record.inputs]
        if frame is not None:
            edges = zip(record.inputs, record.edge_regions, given, strict=True)
            given = [frame.read(source, edge, tangent) for source, edge, tangent in edges]
        tangent = record.rule.pushforward(record, given, _delta(record), sink)
        if frame is not None:
            tangent = frame.inside(node, tangent)
        tangents[node] = tangent
        for source in record.inputs:
            if last[source] is node:
                tangents.pop(source, None)
    return tangents.get(tape.target)


def _delta(record: Record) -> Any:
    """The cotangent of the record's output, if its rule reads it."""
    if record.delta is not None or not record.rule.needs_delta(record):
        return record.delta
    reader = record.sole_reader
    return reader.rule.input_delta(reader)
