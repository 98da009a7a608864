"""One recorded call of a tape."""

from __future__ import annotations

import itertools
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.engine.rules.base import Receiver, Rule
from fastjac.errors import FastjacError

Kept = list[tuple[Tensor, int]]


@dataclass(slots=True)
class Call:
    """A recorded call: its rule, the values that it made (None: not differentiable), and its place.

    ``kept``: tensors that the rule reads in a sweep, with their versions.
    """

    rule: Rule
    outputs: tuple[int | None, ...]
    single: bool
    receivers: tuple[Receiver, ...]
    name: str
    module: Any
    kept: Kept

    def with_rule(
        self, rule: Rule, outputs: tuple[int | None, ...], receivers: tuple[Receiver, ...]
    ) -> Call:
        """The same call by another rule."""
        return Call(rule, outputs, self.single, receivers, self.name, self.module, self.kept)

    def by_copies(self, rule: Rule) -> Call:
        """The same call by its rule on copies, on crops say, of what it read."""
        if rule is self.rule:
            return self
        # What the rule on copies has replaced; to look for what it still holds is slower.
        gone = _fields(self.rule) - _fields(rule)
        kept = [entry for entry in self.kept if id(entry[0]) not in gone]
        return Call(rule, self.outputs, self.single, self.receivers, self.name, self.module, kept)

    def unchanged(self) -> bool:
        """Whether nothing that the rule reads was overwritten since it was kept."""
        return all(tensor._version == version for tensor, version in self.kept)

    def check_versions(self) -> None:
        """Raise if a tensor that the rule reads was overwritten or freed since it was kept."""
        for tensor, version in self.kept:
            strided = tensor.layout == torch.strided
            if strided and tensor.numel() and not tensor.untyped_storage().size():
                raise FastjacError(
                    f"a tensor {list(tensor.shape)} that {self.name} needs for its derivative was freed "
                    "after the forward; of a model under fully_shard, expected "
                    "reshard_after_forward=False"
                )
            if tensor._version != version:
                raise FastjacError(
                    f"a value {list(tensor.shape)} that {self.name} needs for its derivative was "
                    "overwritten in place by a later operation (or a parameter by an optimizer's step, "
                    "before the backward); use the operation that is not in place"
                )


def _fields(rule: Rule) -> set[int]:
    """The identities of what a rule has in its fields, and in their lists."""
    values = list(vars(rule).values())
    return set(map(id, itertools.chain(values, *(v for v in values if type(v) is list))))


def calling_module() -> Any:
    """A weak reference to the module whose forward makes the current call."""
    frame = sys._getframe(3)
    for _ in range(8):
        if frame is None:
            return None
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                return weakref.ref(owner)
        frame = frame.f_back
    return None


def own_lists(value: Any) -> Any:
    """Arguments whose lists are copies: a rule reads them again, and the model may change its own.

    So may it a tensor that bounds a slice: a number, as PyTorch takes it.
    """
    if type(value) is slice:
        bounds = (value.start, value.stop, value.step)
        return slice(*(int(b) if isinstance(b, Tensor) else b for b in bounds))
    if type(value) is tuple:
        return tuple(map(own_lists, value))
    if type(value) is list:
        return [*map(own_lists, value)]
    if type(value) is dict:
        return {key: own_lists(item) for key, item in value.items()}
    return value
