"""One rule for each kind of call, in a file per family, and the registry of which function has which."""

from __future__ import annotations

from typing import Any

from fastjac.engine.rules import (  # noqa: F401  they register
    affine_maps,
    attention,
    group_norm,
    layer_norm,
    layers,
    linear_maps,
    pointwise,
    pools,
    smooth,
    softmax,
    synchronised,
    views,
)
from fastjac.engine.rules.base import NotLocalError, Receiver, Rule, register_rule, registered
from fastjac.engine.rules.chains import fused_rule
from fastjac.engine.rules.generic import Generic
from fastjac.engine.rules.synchronised import synchronised_batch_norms

__all__ = [
    "NotLocalError",
    "Receiver",
    "Rule",
    "fused_rule",
    "register_rule",
    "rules_for",
    "synchronised_batch_norms",
]


def rules_for(function: Any) -> list[type[Rule]]:
    """The rules that may cover a call, best first; the last covers every call."""
    return [*registered(function), Generic]
