"""The rule of every call that has none of its own: autograd on that call alone.

Right wherever PyTorch has the operation's derivatives, if slower. The reverse sweep runs the call again
and differentiates it. The forward sweep differentiates the call alone twice, in reverse:
<delta, f'(x) x'> is linear in delta, so its derivative in delta is the tangent y', and its derivatives
in x and w are the curvature and the gradients. The graph of that backward holds one call, and is gone
when the rule returns. Forward mode would do no more: PyTorch 2.14 has no operator whose backward it can
differentiate in that mode alone, and there it drops terms without a word (of torch.linalg.solve, whose
saved factors carry no tangent; of the statistics of norms).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastjac.engine.rules.base import Receiver, Recorded, Rule, register_rule
from fastjac.engine.rules.enclosed import enclosed
from fastjac.engine.rules.random_numbers import RecordDraws, ReplayDraws
from fastjac.errors import FastjacError
from fastjac.fusion.mode import function_name, tensors_in, writes_in_place

if TYPE_CHECKING:
    from fastjac.engine.site import Site

_ATTENTION = F.scaled_dot_product_attention  # as PyTorch has it, whatever a user puts there later
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


# By a part of the name: calls that update running statistics or observers, without a new version.
_STATEFUL = ("native_batch_norm", "fused_moving_avg_obs")


@dataclass(frozen=True)
class Leaf:
    """The place of a differentiated tensor among a call's arguments."""

    index: int


@dataclass
class Generic(Rule):
    """y = f(x, ...; w) for any differentiable f, with any arguments and outputs.

    ``leaves`` are the tensors that the call is differentiated in, the sources first; ``template`` is
    its arguments with those in their places. ``receives``: which leaves get a gradient. ``stateful``:
    whether the call updates some of its arguments, and must meet them as they were whenever it is run.
    """

    function: Any
    template: tuple[Any, dict[str, Any]]
    leaves: list[Tensor]
    receives: list[bool]
    single: bool
    context: Callable[[], Any]
    in_place: bool
    stateful: bool

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded:
        function = site.function
        in_place = writes_in_place(function, args, kwargs)
        if in_place and not isinstance(args[0], Tensor):
            raise FastjacError(
                f"{function_name(function)} writes in place to several tensors; use the operation that "
                "is not in place"
            )
        found = {id(t): t for t in tensors_in(args, kwargs) if _is_leaf(site, t)}
        ordered = sorted(found.values(), key=lambda t: site.number(t) is None)
        numbers = [site.number(t) for t in ordered]
        place = {id(t): Leaf(i) for i, t in enumerate(ordered)}
        constants = [(t, t._version) for t in tensors_in(args, kwargs) if id(t) not in place]
        stateful = any(name in function_name(function) for name in _STATEFUL)
        before = {id(t): t.detach().clone() for t, _ in constants} if stateful else {}
        leaves, receivers = [], []
        written = overwrites = args[0] if in_place else None
        if in_place and id(written) not in place:
            place[id(written)] = written.detach().clone()
        for i, (tensor, number) in enumerate(zip(ordered, numbers, strict=True)):
            source = None if number is None else i
            if tensor is written:
                leaves.append(tensor.detach().clone())
                overwrites, slot = site.before_writing(tensor)
                receivers.append(() if slot is None else (Receiver(slot, source),))
            else:
                leaves.append(site.keep(tensor))
                receivers.append(site.receives(tensor, source))
        context = _Context(function, ordered[0].device)
        with context.recorded(args, kwargs), enclosed(site, args, kwargs):
            if overwrites is written:
                y = site.run(*args, **kwargs)
            else:
                site.run(overwrites, *args[1:], **kwargs)
        if overwrites is not written:
            y = written.copy_(overwrites)
        for tensor, version in constants:
            if stateful:
                place[id(tensor)] = before[id(tensor)]
            elif tensor is not written and tensor._version == version:
                place[id(tensor)] = site.keep(tensor)
            elif tensor is not written:  # running statistics: a sweep must not update them again
                place[id(tensor)] = tensor.detach().clone()
        template = map_tensors(lambda t: place.get(id(t), t), (args, kwargs))
        sources = tuple(n for n in numbers if n is not None)
        rule = cls(
            *(sources, function, template, leaves, list(map(bool, receivers))),
            *(isinstance(y, Tensor) or y is None, context, in_place, stateful),
        )
        return y, rule, tuple(r for group in receivers for r in group)

    def needs_delta(self) -> bool:
        return any(self.receives)

    def _again(self, leaves: list[Tensor]) -> list[Tensor | None]:
        """Run the call on other leaves; its outputs, None where one carries no derivative."""
        constant = torch.clone if self.stateful else lambda t: t
        args, kwargs = map_tensors(constant, self.template, leaves)
        if self.in_place:
            args = (args[0].clone(), *args[1:])
        with self.context():
            out = self.function(*args, **kwargs)
        out = args[0] if out is None and self.in_place else out
        return [t if t.is_floating_point() or t.is_complex() else None for t in tensors_in(out)]

    def _deltas(self, delta: Any) -> list[Tensor | None]:
        return [delta] if self.single else list(delta)

    def vjp(self, delta: Any) -> list[Tensor]:
        count = len(self.sources)
        with torch.enable_grad(), named_errors(self.function, "derivative"):
            sources = [fresh(t) for t in self.leaves[:count]]
            outputs = self._again(sources + self.leaves[count:])
            pairs = [
                (y, d.to(y.dtype))
                for y, d in zip(outputs, self._deltas(delta), strict=True)
                if y is not None and d is not None and y.requires_grad
            ]
            if not pairs:
                return [torch.zeros_like(x) for x in sources]
            ys, deltas = zip(*pairs, strict=True)
            return list(torch.autograd.grad(ys, sources, deltas, materialize_grads=True))

    def jvp(self, tangents: Any, delta: Any) -> tuple[Any, list[Tensor | None]]:
        with torch.enable_grad(), named_errors(self.function, "second derivative"):
            pushed, gradients = self._reverse_over_reverse(
                [fresh(t) for t in self.leaves], tangents, delta
            )
        wanted = [g for g, received in zip(gradients, self.receives, strict=True) if received]
        return pushed[0] if self.single else pushed, wanted

    def _reverse_over_reverse(
        self, leaves: list[Tensor], tangents: Any, delta: Any
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        outputs = self._again(leaves)
        # Without a cotangent any serves: a backward is linear in it, but not always at zero.
        absent = torch.ones_like if delta is None else torch.zeros_like
        given = [None] * len(outputs) if delta is None else self._deltas(delta)
        pairs = [
            (i, y, fresh(absent(y) if d is None else d.to(y.dtype)))
            for i, (y, d) in enumerate(zip(outputs, given, strict=True))
            if y is not None and y.requires_grad
        ]
        pushed: list[Tensor | None] = [None] * len(outputs)
        if not pairs:
            return _detached(outputs, pushed), [None] * len(leaves)
        places, ys, deltas = zip(*pairs, strict=True)
        sources = leaves[: len(self.sources)]
        pulled = torch.autograd.grad(ys, sources, deltas, create_graph=True, allow_unused=True)
        curved = [
            (g, t.to(g.dtype))
            for g, t in zip(pulled, tangents, strict=True)
            if g is not None and g.requires_grad
        ]
        if not curved:  # flat: floor, sign
            return _detached(outputs, pushed), [None] * len(leaves)
        pulled, tangents = zip(*curved, strict=True)
        check_twice_differentiable(*pulled)
        found = torch.autograd.grad(pulled, [*deltas, *leaves], tangents, allow_unused=True)
        for place, tangent in zip(places, found, strict=False):
            pushed[place] = tangent
        return _detached(outputs, pushed), list(found[len(deltas) :])


@register_rule(torch.logcumsumexp, Tensor.logcumsumexp)
class LogCumSumExp(Generic):
    """Its backward takes the logarithm of the cotangent: PyTorch's derivative of that is wrong at 0.

    Both results are linear in the cotangent: those of two that are positive everywhere.
    """

    def jvp(self, tangents: Any, delta: Any) -> tuple[Any, list[Tensor | None]]:
        if delta is None or not delta.numel():
            return super().jvp(tangents, delta)
        shift = (2 * delta.abs().amax() + torch.finfo(delta.dtype).tiny).expand(delta.shape)
        pushed, shifted = super().jvp(tangents, delta + shift)
        _, surplus = super().jvp(tangents, shift)
        return pushed, [a - b for a, b in zip(shifted, surplus, strict=True)]


class _Context:
    """The surroundings of a call: autocast, its kernels, and the random numbers that it drew."""

    def __init__(self, function: Any, device: torch.device) -> None:
        self.device, self.draws = device, []
        kind = device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.attention = function is _ATTENTION
        self.recurrent = function in _RECURRENT

    @contextmanager
    def recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """The first run: the random numbers that it draws are kept."""
        with ExitStack() as stack:
            if self.attention or self.recurrent:
                if not self._drops(args, kwargs):
                    yield
                    return
                # Each library draws its own dropout: take the kernels that the sweeps run.
                self._choose_kernels(stack)
            recorder = stack.enter_context(RecordDraws())
            yield
            self.draws = recorder.draws

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            dtype = self.autocast
            stack.enter_context(
                torch.autocast(
                    self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False
                )
            )
            self._choose_kernels(stack)
            if self.draws:
                stack.enter_context(ReplayDraws(self.draws))
            yield

    def _choose_kernels(self, stack: ExitStack) -> None:
        if self.attention:  # only this kernel has second derivatives
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self.recurrent:  # nor have these libraries'
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # Its other flags, by default, would be set as well, of which one warns.
            others = dict.fromkeys(("deterministic", "allow_tf32", "fp32_precision"))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, **others))

    def _drops(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an attention or recurrent function has dropout."""
        if self.recurrent:  # its dropout is its one float, and whether it trains follows
            pairs = itertools.pairwise(args)
            return any(isinstance(p, float) and p > 0 and trains for p, trains in pairs)
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0


def _is_leaf(site: Site, tensor: Tensor) -> bool:
    """Whether a call is differentiated in this argument."""
    return site.varies(tensor) or bool(site.receives(tensor))


def map_tensors(
    function: Callable[[Tensor], Any], value: Any, leaves: list[Tensor] | None = None
) -> Any:
    """``function`` of every tensor in nested arguments; :class:`Leaf` s replaced by ``leaves``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Leaf):
        return value if leaves is None else leaves[value.index]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v, leaves) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, v, leaves) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(function, v, leaves) for k, v in value.items()}
    return value


@contextmanager
def named_errors(function: Any, what: str) -> Iterator[None]:
    """Tell what PyTorch's errors say of a derivative that a function does not have."""
    try:
        yield
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, FastjacError) or "out of memory" in str(error):
            raise
        reason = str(error).split("\n")[0].split(". ")[0]
        raise FastjacError(
            f"{function_name(function)} has no {what} in PyTorch that fastjac can take ({reason}); "
            "give it a rule with fastjac.register_rule, or use operations that have one"
        ) from error


def fresh(tensor: Tensor) -> Tensor:
    """A leaf of a graph of its own, with the same values."""
    return tensor.detach().requires_grad_()


def _detached(outputs: list[Tensor | None], pushed: list[Tensor | None]) -> list[Tensor | None]:
    """The tangents of all outputs, zero where a call's result does not depend on its source."""
    return [
        None if y is None else torch.zeros_like(y).detach() if t is None else t.detach()
        for y, t in zip(outputs, pushed, strict=True)
    ]


def check_twice_differentiable(*pulled: Tensor) -> None:
    """Raise if a backward in the graphs of ``pulled`` is ``once_differentiable``.

    PyTorch has its error raised by a node that leads to no input, and so is not run.
    """
    todo, seen = [tensor.grad_fn for tensor in pulled], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a backward in it is once_differentiable")
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
