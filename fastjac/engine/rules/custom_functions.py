"""Custom autograd functions (``torch.autograd.Function``), recorded from autograd's node.

No mode sees their ``apply``. But what one of them made has a node, which leads to its arguments and
holds what its backward reads. So the call is recorded when its result is first read: the reverse sweep
calls that backward, and the forward sweep differentiates it, as a double backward does. The function's
forward runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function, FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastjac.engine.call import Call
from fastjac.engine.rules.base import Receiver, Rule
from fastjac.engine.rules.generic import (
    Leaf,
    check_twice_differentiable,
    fresh,
    map_tensors,
    named_errors,
)
from fastjac.errors import FastjacError
from fastjac.fusion.mode import in_checkpoint, operation_name, tensors_in
from fastjac.replaced import original

if TYPE_CHECKING:
    from fastjac.engine.tape import Tape, Value

# PyTorch's own are parts of its machinery, and ours are recorded as other calls.
_NOT_THE_USERS = ("torch", "fastjac")
# Operations by name: of a derivative that is zero, and those that read no values.
PIECEWISE_CONSTANT = {"sign", "sgn", "round", "floor", "ceil", "trunc", "heaviside"}
_MAKES_CONSTANTS = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_MAKES_CONSTANTS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
# Of these the tape's error says what to use.
_WITH_ADVICE = ("SyncBatchNorm", "CheckpointFunction", "Gather")


def custom_output(tape: Tape, node: Any, output: int) -> Value | None:
    """What a tape knows of an output of a custom function's ``node``, which it records if need be."""
    if not isinstance(node, BackwardCFunction):
        return None
    function = node._forward_cls
    if output not in tape.outputs_of(node):
        named = function.__name__ in _WITH_ADVICE
        if named or function.__module__.partition(".")[0] in _NOT_THE_USERS:
            return None
        if in_checkpoint() or node._sequence_nr() in tape.checkpointed:
            return None  # what it has saved can be read in the backward alone
        _record(tape, node, function)
    return tape.outputs_of(node).get(output)


def _record(tape: Tape, node: Any, function: Any) -> None:
    """Record the call that made ``node``, unless nothing that it reads depends on x."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    positions = [i for i, needed in enumerate(node.needs_input_grad) if needed]
    if len(edges) != len(positions):
        return
    values = [tape.value_behind(*edge) for edge in edges]
    sources = [i for i, value in enumerate(values) if value is not None]
    # A constant has a graph of its own; one that leads to x otherwise was computed where no mode sees.
    unseen = (e[0] for e, value in zip(edges, values, strict=True) if value is None)
    if not sources or any(map(tape.leads_to_values, unseen)):
        return
    trains = [tape.differentiable and (v is None or v.trainable) for v in values]
    leaves: dict[Any, Tensor] = {}

    def leaf(tensor: Tensor) -> Any:
        """The place of a tensor that the backward reads; as it is where no gradient goes there."""
        nonlocal lost
        alias = tensor.detach()
        kept.append((alias, alias._version))
        if not tensor.requires_grad:
            if tape.computed_inside(node, tensor):
                lost = f"a tensor {list(tensor.shape)} that its forward computes and ctx holds"
            return alias
        place = _place(tensor, node, edges)
        if place is None:
            raise _refusal(
                function, f"reads a tensor {list(tensor.shape)} that is not its argument"
            )
        leaves.setdefault(place, tensor)
        return Leaf(list(leaves).index(place))

    kept: list[tuple[Tensor, int]] = []
    lost: str | None = None
    try:
        saved = node.saved_tensors
    except RuntimeError as error:  # overwritten since
        raise FastjacError(f"{function.__name__}: {str(error).split(';')[0]}") from error
    read = map_tensors(leaf, (list(saved), dict(node.__dict__)))
    receives = [any(trains) if place < 0 else trains[place] for place in leaves]
    receivers = tuple(Receiver(t) for t, r in zip(leaves.values(), receives, strict=True) if r)
    made = [(m.shape, m.dtype, m.device) for m in node._input_metadata]
    rule = CustomFunction(
        *(tuple(values[i].number for i in sources), function, read, node.needs_input_grad),
        *([positions[i] for i in sources], [t.detach() for t in leaves.values()], receives, made),
        *([(tape.shapes[values[i].number], tape.dtypes[values[i].number]) for i in sources], lost),
    )
    numbers = tape.assign_outputs(node, [(torch.Size(s), d) for s, d, _ in made], any(trains))
    single = len(made) == 1
    tape.calls.append(Call(rule, numbers, single, receivers, function.__name__, None, kept))


def _place(tensor: Tensor, node: Any, edges: list[tuple[Any, int]]) -> int | None:
    """Which of a node's arguments a saved tensor is; of an output, a number below 0."""
    if tensor.grad_fn is node:
        return -1 - tensor.output_nr
    for i, (function, output) in enumerate(edges):
        if tensor.grad_fn is None:
            if getattr(function, "variable", None) is tensor:
                return i
        elif tensor.grad_fn is function and tensor.output_nr == output:
            return i
    return None


@dataclass
class CustomFunction(Rule):
    """y = f(x; w) by a custom function: its own backward, and that differentiated in reverse.

    ``read``: the saved tensors and the attributes of ``ctx``, with a :class:`Leaf` where a gradient
    goes; ``positions``: those of the sources among the arguments; ``made``: the outputs' shapes and
    types, and ``given``: those of the sources; ``lost``: what the backward reads as if it were constant.
    """

    function: Any
    read: tuple[list[Any], dict[str, Any]]
    needs_input_grad: tuple[bool, ...]
    positions: list[int]
    leaves: list[Tensor]
    receives: list[bool]
    made: list[tuple[Any, torch.dtype, torch.device]]
    given: list[tuple[torch.Size, torch.dtype]]
    lost: str | None

    def needs_delta(self) -> bool:
        return True  # a backward that clips, say, is not linear in it

    def vjp(self, delta: Any) -> list[Tensor]:
        # They require gradients, as a backward may ask of them.
        leaves, deltas = [fresh(t) for t in self.leaves], self._deltas(delta)
        watch = _Watch(self.function, leaves)
        with torch.no_grad(), named_errors(self.function, "first derivative"), watch:
            pulled = self._pulled(leaves, deltas)
        return [
            torch.zeros(shape, dtype=dtype, device=deltas[0].device) if g is None else g
            for g, (shape, dtype) in zip(pulled, self.given, strict=True)
        ]

    def jvp(self, tangents: Sequence[Tensor], delta: Any) -> tuple[Any, list[Tensor | None]]:
        leaves = [fresh(t) for t in self.leaves]
        deltas = [fresh(d) for d in self._deltas(delta)]
        found: Sequence[Tensor | None] = [None] * (len(deltas) + len(leaves))
        with torch.enable_grad(), named_errors(self.function, "second derivative"):
            with _WatchDerivatives(self.lost) as watch:
                cotangents = self._pulled(leaves, deltas)
            pulled = zip(cotangents, tangents, strict=True)
            product = sum(_inner(g, t.to(g.dtype)) for g, t in pulled if g is not None)
            if isinstance(product, Tensor) and product.requires_grad:
                check_twice_differentiable(product)
            if watch.lost is not None:
                raise _loss(self.function, watch.lost)
            if isinstance(product, Tensor) and product.requires_grad:
                found = torch.autograd.grad(product, [*deltas, *leaves], allow_unused=True)
        pushed = [
            torch.zeros_like(d).detach() if t is None else t
            for d, t in zip(deltas, found, strict=False)
        ]
        gradients = zip(found[len(deltas) :], self.receives, strict=True)
        kept = [gradient for gradient, received in gradients if received]
        return (pushed[0] if len(pushed) == 1 else pushed), kept

    def _deltas(self, delta: Any) -> list[Tensor]:
        """The cotangents of all outputs."""
        given = [delta] if len(self.made) == 1 else delta
        return [
            torch.zeros(shape, dtype=dtype, device=device) if d is None else d.to(dtype)
            for d, (shape, dtype, device) in zip(given, self.made, strict=True)
        ]

    def _pulled(self, leaves: list[Tensor], deltas: list[Tensor]) -> list[Tensor | None]:
        """The cotangents of the sources, as the function's backward gives them."""
        saved, attributes = map_tensors(lambda t: t, self.read, leaves)
        context = FunctionCtx()
        context.__dict__.update(
            attributes, saved_tensors=tuple(saved), needs_input_grad=self.needs_input_grad
        )
        own = self.function.vjp is not Function.vjp
        backward = self.function.vjp if own else self.function.backward
        boxed = getattr(self.function, "boxed_grads_call", False)
        deltas = [d.clone() for d in deltas]  # a backward may write to them
        found = backward(context, deltas) if boxed else backward(context, *deltas)
        found = found if isinstance(found, tuple | list) else (found,)
        # As autograd has them: a gradient that broadcasts is summed, and has its tensor's type.
        return [
            None if found[i] is None else found[i].sum_to_size(shape).to(dtype)
            for i, (shape, dtype) in zip(self.positions, self.given, strict=True)
        ]


class _Watch(TorchDispatchMode):
    """Raises where a backward reads a parameter that the function is not given, or draws numbers."""

    def __init__(self, function: Any, leaves: list[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.given = {t.untyped_storage()._cdata for t in leaves}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ()):
            raise _refusal(self.function, "draws random numbers")
        for tensor in tensors_in(args, kwargs):
            if tensor.requires_grad and tensor.untyped_storage()._cdata not in self.given:
                raise _refusal(
                    self.function, f"reads a tensor {list(tensor.shape)} that is not its argument"
                )
        return operator(*args, **kwargs)


class _WatchDerivatives(TorchFunctionMode):
    """Notes where a backward computes what has no derivative: by ``detach``, or under ``no_grad``."""

    def __init__(self, lost: str | None) -> None:
        super().__init__()
        self.lost = lost

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        function = original(function)
        out = function(*args, **(kwargs or {}))
        name = operation_name(function)
        if name not in PIECEWISE_CONSTANT | _MAKES_CONSTANTS and self.lost is None:
            made = (t for t in tensors_in(out) if t.is_floating_point() or t.is_complex())
            if any(not t.requires_grad for t in made):
                read = any(t.requires_grad for t in tensors_in(args, kwargs))
                self.lost = f"what {name} gives" if read else None
        return out


def _loss(function: Any, what: str) -> FastjacError:
    return FastjacError(
        f"the backward of the custom autograd function {function.__name__} takes for a constant "
        f"{what}, so its own derivative is wrong; expected a backward of the function's arguments and "
        "outputs that autograd can follow, or strategy='autograd', where PyTorch drops that term"
    )


def _refusal(function: Any, what: str) -> FastjacError:
    return FastjacError(
        f"the backward of the custom autograd function {function.__name__} {what}, so that fastjac "
        "cannot differentiate it; expected one of its arguments and outputs, by "
        "ctx.save_for_backward, or strategy='autograd'"
    )


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product, which complex numbers have as pairs of real ones."""
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b).sum()
