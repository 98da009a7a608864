"""The random numbers of an opaque call: kept when it runs, and given again when a sweep runs it anew.

They are the results of the operators that draw, seen through a dispatch mode. To read and set a
generator's state would do the same, but a CUDA graph forbids it, and it copies states at every call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastjac.errors import FastjacError
from fastjac.fusion.mode import tensors_in

_TAGGED = ("aten", "prims", "fastjac")  # whose operators say themselves whether they draw


class Draw(NamedTuple):
    """What one operator gave: the values that it wrote to its arguments, and its results."""

    operator: OpOverload
    written: list[Tensor]
    results: Any


class _Argument(NamedTuple):
    """A result that is one of the arguments that the operator wrote to."""

    place: int


class RecordDraws(TorchDispatchMode):
    """Records what the operators that draw random numbers give, in their order."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        results = operator(*args, **kwargs)
        if _may_draw(operator):
            written = _written(operator, args, kwargs)
            places = {id(t): _Argument(i) for i, t in enumerate(written)}
            kept = tree_map(lambda r: places.get(id(r)) or _copy(r), results)
            self.draws.append(Draw(operator, [t.clone() for t in written], kept))
        return results


class ReplayDraws(TorchDispatchMode):
    """Gives the operators that draw the results of ``draws``, instead of running them."""

    supports_higher_order_operators = True

    def __init__(self, draws: list[Draw]) -> None:
        super().__init__()
        self._left = iter(draws)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _may_draw(operator):
            return operator(*args, **kwargs)
        draw = next(self._left, None)
        if draw is None or draw.operator is not operator:
            before = "nothing" if draw is None else draw.operator
            raise FastjacError(
                f"{operator} draws random numbers in a sweep where the forward ran {before}; expected "
                "a function that runs the same operators whenever it is called"
            )
        written = _written(operator, args, kwargs)
        for tensor, values in zip(written, draw.written, strict=True):
            tensor.copy_(values)
        return tree_map(
            lambda r: written[r.place] if isinstance(r, _Argument) else _copy(r),
            draw.results,
            is_leaf=lambda r: isinstance(r, _Argument),
        )


def _may_draw(operator: Any) -> bool:
    """Whether an operator may draw: PyTorch's are tagged, others may do anything."""
    if not isinstance(operator, OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in operator.tags or operator.namespace not in _TAGGED


def _written(operator: OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that the operator's schema says it writes to."""
    found: list[Tensor] = []
    for i, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
