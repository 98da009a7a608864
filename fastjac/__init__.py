"""fastjac: exact Jacobian matching without a double backward."""

from fastjac.engine.rules import register_rule
from fastjac.errors import FastjacError
from fastjac.fusion import FusedModel, fuse
from fastjac.graphs import graphed
from fastjac.jacobian import JacobianOutput, input_jacobian, with_jacobian
from fastjac.losses import (
    activation_match_loss,
    attention_match_loss,
    gradient_penalty,
    jacobian_cosine_loss,
    jacobian_match_loss,
    jacobian_norm_penalty,
    masked_jacobian_penalty,
)
from fastjac.matching import JacobianMatching, MatchingOutput
from fastjac.targets import AttentionWindow, LabelLogit, Logits, Projection, Scalar, Target

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
