"""One rule for each kind of call, in a file per family, and the registry of which function has which."""

from __future__ import annotations

from typing import Any

from fastjac.engine.rules import group_norm, layers, linear_maps, pointwise, pools, views  # noqa: F401  they register
from fastjac.engine.rules.base import NotLocalError, Receiver, Rule, register_rule, registered
from fastjac.engine.rules.chains import fused_rule
from fastjac.engine.rules.generic import Generic

__all__ = ["NotLocalError", "Receiver", "Rule", "fused_rule", "register_rule", "rules_for"]


def rules_for(function: Any) -> list[type[Rule]]:
    """The rules that may cover a call, best first; the last covers every call."""
    return [*registered(function), Generic]
