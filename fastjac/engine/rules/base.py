"""What a rule is: one recorded call, and how it is differentiated.

For y = f(x; w), with delta the cotangent of y in the reverse sweep of phi and x' the tangent of x in
the forward sweep of v: ``vjp`` gives the cotangent of x; ``jvp`` gives y', and the gradients of
<delta, y'> with respect to w and, for a nonlinear f, to x: the curvature. docs/design.md has the
formulas.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.memory import share_memory
from fastjac.engine.receptive_field import KernelGeometry, Region
from fastjac.errors import FastjacError

if TYPE_CHECKING:
    from fastjac.engine.site import Site


class NotLocalError(Exception):
    """Why the outputs of a call see the whole of its input."""


class Receiver(NamedTuple):
    """A tensor that a rule's ``jvp`` gives a gradient of.

    ``source``: which of the rule's sources it is, of which a crop's gradient is a crop; None for a
    parameter, whose gradient is whole.
    """

    tensor: Tensor
    source: int | None = None


Recorded = tuple[Any, "Rule", tuple[Receiver, ...]]


@dataclass
class Rule:
    """One recorded call: a value, with what it kept of the forward in typed fields.

    A subclass is a dataclass, and implements :meth:`record`, :meth:`vjp` and :meth:`jvp`; with
    :meth:`input_regions` and :meth:`crop` it also runs on crops. Nothing is set from elsewhere, and a
    sweep changes nothing, so that several scalars can be differentiated from one forward.

    Attributes:
        sources: the numbers of the values that the derivative goes to, in the order of ``vjp``'s result.
    """

    sources: tuple[int, ...]

    recomputes_cotangent: ClassVar[bool] = False
    """Whether ``vjp`` is so cheap that its result is recomputed in the forward sweep, not stored."""

    stays_inside: ClassVar[bool] = False
    """Whether on crops, no pixel inside of a map is linked with one outside of another."""

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        """Run the call with ``site.run`` and record it.

        Returns its result, the rule, and the receivers of ``jvp``'s gradients (``site.receives``);
        or NotImplemented, before running anything, for arguments that the rule does not cover.
        """
        raise NotImplementedError(cls.__name__)

    def needs_delta(self) -> bool:
        """Whether ``jvp`` reads the cotangent of the output."""
        return False

    def with_copies(self, written: Tensor) -> Rule:
        """The rule with copies of what it holds of a tensor that is about to be overwritten.

        Autograd allows the write where it saves none of that, and raises in the backward where it does.
        """
        fields = {name: _apart(value, written) for name, value in vars(self).items()}
        unchanged = all(value is fields[name] for name, value in vars(self).items())
        return self if unchanged else self.changed(**fields)

    def processes(self) -> Any:
        """The process group that the sweeps exchange sums with; None: none."""
        return None

    def vjp(self, delta: Any) -> Sequence[Tensor | None]:
        """The cotangent of each source. Of several outputs, ``delta`` lists the cotangents (or None)."""
        raise NotImplementedError(type(self).__name__)

    def jvp(self, tangents: Sequence[Tensor], delta: Any) -> tuple[Any, Sequence[Tensor | None]]:
        """The tangent of the output (of several, a list), and the gradient of each receiver."""
        raise NotImplementedError(type(self).__name__)

    def input_regions(self, region: Region) -> list[Region]:
        """The region of each source that ``region`` of the output sees. Default: all of it."""
        raise NotLocalError("its output sees the whole of its input")

    def crop(self, crops: Crops, region: Region) -> Rule:
        """The rule on crops, for an output of ``region``."""
        return self

    def changed(self, **fields: Any) -> Any:
        """A copy with other fields."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **fields)
        return copy


def _apart(value: Any, written: Tensor) -> Any:
    """A rule's field, with a copy of each tensor that has its memory in common with ``written``."""
    if type(value) is list:
        copies = [_apart(item, written) for item in value]
        return value if all(map(operator.is_, copies, value)) else copies
    shared = isinstance(value, Tensor) and share_memory(value, written)
    return value.clone() if shared else value


@dataclass
class Pointwise(Rule):
    """A rule whose output at a pixel sees the same pixel of each source."""

    stays_inside: ClassVar[bool] = True

    def input_regions(self, region: Region) -> list[Region]:
        return [region] * len(self.sources)


def compute_type(tensor: Tensor) -> torch.dtype:
    """What sums over ``tensor`` are accumulated in: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def axis_geometry(*sizes: Any) -> tuple[KernelGeometry, KernelGeometry]:
    """The geometry of both axes of a map, from kernel, stride, padding and dilation."""
    rows, cols = zip(*map(pair, sizes), strict=True)
    return KernelGeometry(*rows), KernelGeometry(*cols)


def pair(value: Any) -> tuple[int, int]:
    """One size for both axes of a map, or one for each."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


_RULES: dict[Any, list[type[Rule]]] = {}


def register_rule(*functions: Any) -> Callable[[type[Rule]], type[Rule]]:
    """Give PyTorch functions a rule: a class decorator.

    ``functions`` as ``__torch_function__`` sees them: ``torch.nn.functional.linear``,
    ``torch.Tensor.add``, or your own function that calls ``torch.overrides.handle_torch_function``.
    Calls that the rule does not cover (its ``record`` returns NotImplemented), and functions that have
    none, are differentiated by autograd on that call alone. An in-place variant is another function.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> from fastjac.engine.rules import Rule
    >>> @fastjac.register_rule(torch.fliplr)
    ... @dataclass
    ... class Mirror(Rule):
    ...     @classmethod
    ...     def record(cls, site, input):
    ...         return site.run(input), cls((site.number(input),)), ()
    ...     def vjp(self, delta):
    ...         return [delta.flip(1)]
    ...     def jvp(self, tangents, delta):
    ...         return tangents[0].flip(1), ()

    Raises :class:`fastjac.FastjacError` for what is no rule, and for a function that has one already.
    """

    def register(rule: type[Rule]) -> type[Rule]:
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise FastjacError(f"register_rule: expected a subclass of Rule, got {rule!r}")
        if not functions:
            raise FastjacError(
                "register_rule: expected the functions that the rule is for, got none"
            )
        for function in functions:
            if not callable(function):
                raise FastjacError(f"register_rule: expected functions, got {function!r}")
            if function in _RULES:
                name = getattr(function, "__qualname__", function)
                raise FastjacError(
                    f"register_rule: {name} has the rule {_RULES[function][0].__name__} already"
                )
        for function in functions:
            _RULES[function] = [rule]
        return rule

    return register


def register_alternatives(*functions: Any, rules: list[type[Rule]]) -> None:
    """Give functions several rules, of which the first that covers a call is taken."""
    for function in functions:
        _RULES[function] = rules


def registered(function: Any) -> list[type[Rule]]:
    """The rules of a function, best first."""
    return _RULES.get(function, [])
