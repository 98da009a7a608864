"""What a model computes or overwrites where no mode sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import Rule
from fastjac.errors import FastjacError
from fastjac.fusion.mode import function_name, tensors_in


@dataclass
class Unseen(Rule):
    """A value that something unseen has made of what depends on x: an error where J passes through."""

    error: FastjacError

    def vjp(self, delta: Any) -> NoReturn:
        raise self.error

    def input_regions(self, region: Region) -> NoReturn:
        raise self.error


def unseen(name: Any, tensor: Tensor, checkpointed: bool) -> FastjacError:
    """The error for a tensor that ``name`` reads, and no recorded call made.

    ``checkpointed``: whether it was made under ``torch.utils.checkpoint``.
    """
    made = tensor.grad_fn.name().removesuffix("0").removesuffix("Backward")
    if made == "AsStrided":  # what autograd gives a view whose base was overwritten
        return overwritten(name, tensor)
    kept_back = checkpointed and isinstance(tensor.grad_fn, BackwardCFunction)
    advice = _ADVICE.get(made, _ADVICE["checkpointed" if kept_back else "any"])
    return FastjacError(
        f"{_text(name)} reads a tensor {list(tensor.shape)} whose derivative fastjac has not seen: "
        f"{made or 'something'} made it outside of PyTorch's Python functions (a custom "
        "autograd.Function, torch.func, TorchScript, another thread, a compiled region or a C++ "
        f"extension); {advice}"
    )


def overwritten(name: Any, tensor: Tensor) -> FastjacError:
    """The error for a tensor that ``name`` reads, and no recorded call has overwritten."""
    return FastjacError(
        f"{_text(name)} reads a tensor {list(tensor.shape)} that was overwritten in place "
        "where fastjac cannot see it (through a view of it, or in C++); use the operation "
        "that is not in place, or strategy='autograd'"
    )


def other_route(name: Any) -> FastjacError:
    """The error for the caller's x, or what was made of it, that ``name`` reads in the model."""
    return FastjacError(
        f"{_text(name)} reads what depends on x, not through the model's argument, and J "
        "would be without it; expected a value computed inside of the model, or a detached one"
    )


def in_forward_mode(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call makes or reads dual numbers; PyTorch's level is that of all threads."""
    return forward_ad._current_level >= 0 and (
        function is torch._make_dual
        or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors_in(args, kwargs))
    )


def _text(function: Any) -> str:
    return function if isinstance(function, str) else function_name(function)


_ADVICE = {
    "any": "expected PyTorch operations there (for TorchScript, PYTORCH_JIT=0 in the environment), or "
    "strategy='autograd'",
    "checkpointed": "expected a custom function to stand outside of torch.utils.checkpoint",
    "SyncBatchNorm": "expected torch.nn.SyncBatchNorm's own forward, or the module in eval mode",
    "CheckpointFunction": "expected torch.utils.checkpoint with use_reentrant=False",
    "Gather": "expected the module inside a DataParallel: model.module",
}
