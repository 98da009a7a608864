"""The student's (or teacher's) forward, node by node, keeping what the Jacobian's passes need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastjac.engine.record import Record
from fastjac.engine.rules import rules_for
from fastjac.errors import FastjacError
from fastjac.features import check_logits, overwritten
from fastjac.graph import (
    Network,
    Program,
    active,
    describe,
    forward_of,
    refuse_hooks,
    writes_in_place,
)


@dataclass
class Tape:
    """One forward: its results, and the records between the input and the target's node."""

    program: Program
    target: fx.Node
    records: dict[fx.Node, Record]
    shape: torch.Size
    logits: Tensor
    features: Tensor | None


def forward(network: Network, x: Tensor, layer: str | None, batch_stats: str) -> Tape:
    """Run the network on ``x`` as PyTorch would, under its autograd if that is enabled."""
    refuse_hooks(network.model, f"the {type(network.model).__name__}")
    program = network.program(layer)
    target = program.find(layer)
    leading = program.leading_to(target)
    records: dict[fx.Node, Record] = {}
    varying = {program.input}
    features: list[tuple[Tensor, int]] = []

    def call(node: fx.Node, args: Any, kwargs: Any, values: dict[fx.Node, Any]) -> Any:
        if node in leading and not varying.isdisjoint(node.all_input_nodes):
            value = _recorded(program, node, args, kwargs, values, varying, records, batch_stats)
        else:
            value = program.callable(node)[1](*args, **kwargs)
        if node is target and layer is not None:
            map_ = _feature_map(value, layer)
            features.append((map_, 0 if map_.is_inference() else map_._version))
        return value

    logits = check_logits(program.run(x, call), program.root)
    for map_, version in features:
        if not map_.is_inference() and map_._version != version:
            raise overwritten(layer)
    if target not in varying:
        raise FastjacError(f"{describe(target)} does not depend on the input")
    return Tape(program, target, records, x.shape, logits, features[0][0] if features else None)


def _feature_map(value: Any, layer: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 4:
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise FastjacError(
            f"layer {layer!r} is not a feature map: expected [B, C, h, w], got {came}"
        )
    return value


def _recorded(
    program: Program,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[fx.Node, Any],
    varying: set[fx.Node],
    records: dict[fx.Node, Record],
    batch_stats: str,
) -> Any:
    """Run a node through its rule; note it as varying, with its record, if it carries a derivative."""
    root = program.root
    if node.target in ("detach", "detach_"):
        return args[0].detach()
    if node not in program.rules:
        program.rules[node] = rules_for(node, root)
    positions = {
        i
        for i, arg in enumerate(node.args)
        if not varying.isdisjoint(_nodes(arg)) and active(args[i])
    }
    named = any(not varying.isdisjoint(_nodes(v)) for v in node.kwargs.values())
    rules = program.rules[node]
    rule = next(
        r for r in rules if r is rules[-1] or (not named and r.accepts(args, kwargs, positions))
    )
    record = Record(node, rule, batch_stats, torch.is_grad_enabled())
    record.varying = sorted(positions)
    record.inputs = tuple(node.args[i] for i in record.varying if isinstance(node.args[i], fx.Node))
    record.varying_nodes = {n for n in node.all_input_nodes if n in varying and active(values[n])}
    record.values_in = values
    record.in_place = writes_in_place(node, root)
    module, call = program.callable(node)
    record.module, record.raw = module, call if module is None else module.forward
    if module is None:
        value = rule.forward(record, call, args, kwargs)
    else:
        value = _hooked(module, rule, record, args, kwargs)
    del record.values_in
    if active(value):
        varying.add(node)
        records[node] = record
        record.output_dtype = value.dtype if isinstance(value, Tensor) else None
        map_like = isinstance(value, Tensor) and value.dim() == 4
        record.size = tuple(value.shape[2:]) if map_like else None
    return value


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _hooked(
    module: nn.Module, rule: Any, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a leaf module through its rule, and its own forward hooks, once, as ``module(*args)`` would.

    A hook that replaces what it sees would leave the rule with another function: it raises.
    """
    if module._backward_hooks or module._backward_pre_hooks:
        raise FastjacError(
            f"{describe(record.node)} has a backward hook, which would miss the Jacobian's passes; "
            "strategy='autograd' runs it"
        )
    for key, hook in module._forward_pre_hooks.items():
        with_kwargs = key in module._forward_pre_hooks_with_kwargs
        if (hook(module, args, kwargs) if with_kwargs else hook(module, args)) is not None:
            raise _replaced(record, "forward pre-hook", "input")
    value = rule.forward(record, forward_of(module, module.forward), args, kwargs)
    for key, hook in module._forward_hooks.items():
        with_kwargs = key in module._forward_hooks_with_kwargs
        given = (module, args, kwargs, value) if with_kwargs else (module, args, value)
        result = hook(*given)
        if result is not None and result is not value:
            raise _replaced(record, "forward hook", "output")
    return value


def _replaced(record: Record, hook: str, what: str) -> FastjacError:
    return FastjacError(
        f"a {hook} of {describe(record.node)} replaces its {what}, which the Jacobian's passes would "
        "not see; strategy='autograd' runs it"
    )
