"""The native operators, each with its PyTorch reference."""

from fastjac.ops.jacobian_match import jacobian_match, jacobian_match_ref

__all__ = ["jacobian_match", "jacobian_match_ref"]
