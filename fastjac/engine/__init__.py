"""Exact Jacobians and the gradient of a loss in them, without a double backward.

:func:`forward` runs a traced network and keeps what the passes need; :func:`pullback` gives J;
:func:`pushforward` takes v = d loss / d J and gives the loss with its gradient in the parameters, which
autograd then delivers in the ordinary backward.
"""

from fastjac.engine.forward import Tape, forward
from fastjac.engine.pullback import Pulled, in_common, pullback
from fastjac.engine.pushforward import pushforward

__all__ = ["Pulled", "Tape", "forward", "in_common", "pullback", "pushforward"]
