"""fastjac: exact Jacobian matching without a double backward."""

from fastjac.errors import FastjacError
from fastjac.fusion import FusedModel, fuse
from fastjac.losses import activation_match_loss, attention_match_loss, jacobian_match_loss
from fastjac.matching import JacobianMatching, MatchingOutput, input_jacobian
from fastjac.targets import AttentionWindow, LabelLogit

__all__ = [
    "AttentionWindow",
    "FastjacError",
    "FusedModel",
    "JacobianMatching",
    "LabelLogit",
    "MatchingOutput",
    "activation_match_loss",
    "attention_match_loss",
    "fuse",
    "input_jacobian",
    "jacobian_match_loss",
]
