"""fastjac: exact Jacobian matching without a double backward.

PyTorch is imported, and the native operators are loaded, when a public name is first read: by itself
``import fastjac`` takes milliseconds, so that the command line can answer ``--help`` at once.
``import fastjac.ops`` defines ``torch.ops.fastjac``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastjac.engine.rules import register_rule
    from fastjac.errors import FastjacError
    from fastjac.fusion import FusedModel, fuse
    from fastjac.graphs import graphed
    from fastjac.jacobian import JacobianOutput, input_jacobian, with_jacobian
    from fastjac.losses import (
        activation_match_loss,
        attention_match_loss,
        cross_entropy_jacobian_loss,
        gradient_penalty,
        jacobian_cosine_loss,
        jacobian_match_loss,
        jacobian_norm_penalty,
        masked_jacobian_penalty,
    )
    from fastjac.matching import JacobianMatching, MatchingOutput
    from fastjac.targets import AttentionWindow, LabelLogit, Logits, Projection, Scalar, Target

__version__: str  # of the installed package, looked up when it is read

__all__ = [
    "AttentionWindow",
    "FastjacError",
    "FusedModel",
    "JacobianMatching",
    "JacobianOutput",
    "LabelLogit",
    "Logits",
    "MatchingOutput",
    "Projection",
    "Scalar",
    "Target",
    "activation_match_loss",
    "attention_match_loss",
    "cross_entropy_jacobian_loss",
    "fuse",
    "gradient_penalty",
    "graphed",
    "input_jacobian",
    "jacobian_cosine_loss",
    "jacobian_match_loss",
    "jacobian_norm_penalty",
    "masked_jacobian_penalty",
    "register_rule",
    "with_jacobian",
]

# Where the public names are defined; tests/test_public.py holds them against the imports above.
_SOURCES = (
    "engine.rules",
    "errors",
    "fusion",
    "graphs",
    "jacobian",
    "losses",
    "matching",
    "targets",
)


if not TYPE_CHECKING:  # else every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("fastjac")
        if name in __all__:
            _import_public()
            return globals()[name]
        # As if all were imported already: ``import fastjac; fastjac.losses``.
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_public() -> None:
    for source in _SOURCES:
        found = vars(import_module(f"{__name__}.{source}"))
        globals().update({name: found[name] for name in __all__ if name in found})
