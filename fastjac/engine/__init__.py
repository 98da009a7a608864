"""Exact Jacobians and the gradient of a loss in them, without a double backward.

A :class:`Tape` runs a model's own Python and records what it calls; :func:`linearize` is the derivative
of a target's scalar on it; :func:`input_jacobian` gives J, as the output of one autograd function, by
a reverse sweep, and its backward is a forward sweep.
"""

from fastjac.engine.rules import synchronised_batch_norms
from fastjac.engine.sweeps import InputJacobian, Linearization, input_jacobian, linearize
from fastjac.engine.tape import Tape

__all__ = [
    "InputJacobian",
    "Linearization",
    "Tape",
    "input_jacobian",
    "linearize",
    "synchronised_batch_norms",
]
