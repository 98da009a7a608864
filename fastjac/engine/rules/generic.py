"""The rule of every node that has none of its own: autograd on that node alone.

Right wherever PyTorch has the operation's derivatives, if slower: the pullback runs the node again and
differentiates it; the pushforward runs node and backward on dual numbers (forward over reverse), so
that no graph of a backward is ever made. The tangent of the backward's result is the gradient of
<delta, jvp(f, x, x')>. The other order, differentiating the jvp, is right for a few operations alone
(PyTorch's jvp of a layer, instance or batch norm takes its statistics as constants, and says nothing);
:class:`ReverseOverForward` is for those of them whose backward has no forward derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, fx, nn

from fastjac.engine.crops import Crops
from fastjac.engine.record import Edges, Record, Sink
from fastjac.engine.rules.base import Rule
from fastjac.errors import FastjacError
from fastjac.graph import active, describe
from fastjac.reference import BatchStatistics, random_state, same_random_numbers
from fastjac.support import Region


class _Frozen(nn.Module):
    """A module's own forward: no hooks, so that running it again shows to nobody."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


class Generic(Rule):
    """y = f(x, ...; w) for any differentiable f, with any arguments and outputs."""

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return True

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        given = record.values_in
        record.inputs = tuple(n for n in record.node.all_input_nodes if n in record.varying_nodes)
        record.constants = {n: v for n, v in given.items() if n not in record.varying_nodes}
        record.graphs = [given[n] for n in record.inputs]
        record.values = [_each(lambda t: record.keep(t.detach()), g) for g in record.graphs]
        first = next(t for t in _flat(record.values) if isinstance(t, Tensor))
        state = random_state(first)
        statistics = BatchStatistics()
        with statistics:
            y = call(*_ahead(record, args), **kwargs)
        if statistics.recorded and record.batch_stats == "frozen":
            raise FastjacError(
                f"{describe(record.node)} normalises with batch statistics where no trace reaches; "
                "batch_stats='frozen' is unsupported there: use batch_stats='batch' or "
                "strategy='autograd'"
            )
        drew = any(not torch.equal(a, b) for a, b in zip(state, random_state(first), strict=True))
        record.random = (first, state) if drew else None
        return y

    def needs_delta(self, record: Record) -> bool:
        return record.differentiable

    def _again(self, record: Record, values: list[Any]) -> list[Tensor | None]:
        """Run the node on ``values``; its outputs, flat, None where one carries no derivative."""
        args, kwargs = _arguments(
            record, {**record.constants, **dict(zip(record.inputs, values, strict=True))}
        )
        if record.random is None:
            out = self._run(record, args, kwargs)
        else:
            with same_random_numbers(*record.random):
                out = self._run(record, args, kwargs)
        return [t if active(t) else None for t in _flat(out)]

    def _run(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = _ahead(record, args)
        if record.module is None:
            return record.raw(*args, **kwargs)
        buffers = {f"inner.{k}": b.clone() for k, b in record.module.named_buffers()}
        return torch.func.functional_call(_Frozen(record.module), buffers, args, kwargs)

    def pullback(self, record: Record, delta: Any) -> list[Any]:
        with torch.enable_grad():
            leaves = [_leaf(v) for v in record.values]
            flat = _flat(leaves)
            grads = iter(_gradients(_pairs(self._again(record, leaves), _flat(delta)), flat))
        return [_like(leaf, grads) for leaf in leaves]

    def pushforward(self, record: Record, tangents: list[Any], delta: Any, sink: Sink) -> Any:
        with torch.enable_grad(), fwAD.dual_level():
            leaves = [_leaf(v) for v in record.values]
            flat = _flat(leaves)
            duals = [fwAD.make_dual(x, t) for x, t in zip(flat, _flat(tangents), strict=True)]
            given = iter(duals)
            try:
                outputs = self._again(record, [_like(leaf, given) for leaf in leaves])
                pushed = [None if y is None else fwAD.unpack_dual(y).tangent for y in outputs]
                if record.differentiable:
                    self._sink(record, flat, duals, outputs, pushed, delta, sink)
            except NotImplementedError as err:
                raise FastjacError(
                    f"{describe(record.node)} has no forward derivative in PyTorch "
                    f"({str(err).split('. ')[0]}); strategy='autograd' needs none"
                ) from err
        out = [
            None if y is None else torch.zeros_like(y) if t is None else t.detach()
            for y, t in zip(outputs, pushed, strict=True)
        ]
        return out if isinstance(delta, list | tuple) else out[0]

    def _sink(
        self,
        record: Record,
        flat: list[Tensor],
        duals: list[Tensor],
        outputs: list[Tensor | None],
        pushed: list[Tensor | None],
        delta: Any,
        sink: Sink,
    ) -> None:
        constants = [t for t in record.constants.values() if isinstance(t, Tensor)]
        if record.module is not None:
            constants += record.module.parameters()
        constants = [t for t in constants if t.requires_grad]
        grads = self._gradients_of_tangent(flat, duals, constants, outputs, pushed, _flat(delta))
        for tensor, grad in zip(_flat(record.graphs), grads, strict=False):
            if grad is not None:
                record.curve(sink, tensor, grad)
        for tensor, grad in zip(constants, grads[len(flat) :], strict=True):
            if grad is not None:
                sink.add(tensor, grad)

    def _gradients_of_tangent(
        self,
        flat: list[Tensor],
        duals: list[Tensor],
        constants: list[Tensor],
        outputs: list[Tensor | None],
        pushed: list[Tensor | None],
        deltas: list[Any],
    ) -> list[Tensor | None]:
        """The gradient of <delta, y'> with respect to the inputs, then the constants."""
        pairs = _pairs(outputs, deltas)
        grads = _gradients(pairs, duals + constants, allow_none=True)
        return [None if g is None else fwAD.unpack_dual(g).tangent for g in grads]


class ReverseOverForward(Generic):
    """For operations whose jvp PyTorch differentiates rightly, and whose backward has no jvp."""

    def _gradients_of_tangent(
        self,
        flat: list[Tensor],
        duals: list[Tensor],
        constants: list[Tensor],
        outputs: list[Tensor | None],
        pushed: list[Tensor | None],
        deltas: list[Any],
    ) -> list[Tensor | None]:
        return _gradients(_pairs(pushed, deltas), flat + constants, allow_none=True)


class SmoothPointwise(ReverseOverForward):
    """A smooth function of each element, finite with its derivatives at 0: it has crops."""

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return varying == {0}

    def edges(self, record: Record, region: Region) -> Edges:
        return [region]

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        return record.on_crops(values=[crops.gather(record.values[0], region)])


class Pick(Rule):
    """One of the tensors that an operation with several outputs gives."""

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return varying == {0} and isinstance(args[0], tuple | list) and isinstance(args[1], int)

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        record.length, record.at = len(args[0]), args[1] % len(args[0])
        return call(*args, **kwargs)

    def pullback(self, record: Record, delta: Any) -> list[Any]:
        return [[delta if i == record.at else None for i in range(record.length)]]

    def pushforward(self, record: Record, tangents: list[Any], delta: Any, sink: Sink) -> Any:
        return tangents[0][record.at]


def _flat(value: Any) -> list[Any]:
    """The leaves of a value, None among them."""
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``function`` of every tensor in a value."""
    if isinstance(value, tuple | list):
        return [_each(function, item) for item in value]
    return function(value) if isinstance(value, Tensor) else value


def _ahead(record: Record, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for a call: of one in place, a copy of what it overwrites."""
    return (args[0].clone(), *args[1:]) if record.in_place else args


def _arguments(record: Record, values: dict[fx.Node, Any]) -> tuple[Any, Any]:
    """The node's arguments, with ``values`` for the nodes in them."""
    return fx.node.map_arg((record.node.args, record.node.kwargs), values.__getitem__)


def _leaf(value: Any) -> Any:
    return _each(lambda t: t.detach().requires_grad_(), value)


def _like(value: Any, flat: Any) -> Any:
    """The next of ``flat``, in the structure of ``value``."""
    if isinstance(value, tuple | list):
        return [_like(item, flat) for item in value]
    return next(flat)


def _pairs(values: list[Tensor | None], deltas: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """Those values that have a graph and a cotangent, with it."""
    return [
        (y, d)
        for y, d in zip(values, deltas, strict=True)
        if y is not None and d is not None and y.requires_grad
    ]


def _gradients(
    pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor], allow_none: bool = False
) -> list[Tensor | None]:
    """The gradients of sum <y, d> with respect to ``inputs``; zeros, or None, where there is none."""
    grads: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if pairs and inputs:
        outputs, deltas = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, inputs, deltas, allow_unused=True)
    if allow_none:
        return list(grads)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
