"""Run a network with its normalise-activate-pool chains fused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastjac.errors import FastjacError
from fastjac.fusion.chains import ALL_ACTIVATIONS, PIECEWISE_LINEAR
from fastjac.fusion.mode import Fusion, active_fusion, eager_regions, runs_unfused

__all__ = ["ALL_ACTIVATIONS", "PIECEWISE_LINEAR", "FusedModel", "Fusion", "fuse"]


def fuse(model: nn.Module) -> FusedModel:
    """``model`` with each BatchNorm -> (add) -> activation -> (max-pool) as one operator.

    The model's own code runs at every call, so that what it does (random branches, attributes that
    change, hooks, wrappers, patched forwards) is what happens. While it runs, a BatchNorm is computed
    once something other than an addition, an activation or a max-pool reads it.

    What it saves, in training: PyTorch keeps BatchNorm's input u, the activation's output, the pool's
    output and its int64 indices, 11 bytes for each fp32 element of u with a 2x2 pool; fused, u and the
    pool's output stay, 5 bytes. Without a pool or an addition, u alone stays, 4 bytes instead of 8: what
    follows (a convolution, for its weight's gradient) has the activation recomputed in the backward. So
    is u itself where a first convolution gives it, of at most 160 products for an output and at least
    twice as large as the image: nothing of it stays.
    Forward and backward read and write u-sized maps half as often.

    On a CPU, maps of a MiB and more are allocated with malloc, so that glibc can reuse freed blocks.
    PyTorch's profiler does not count them; such a tensor's storage cannot be resized.

    On a CPU, in float32 or float64 and channels-last layout, its 3x3 convolutions of stride 1 and at
    least 32 channels, a multiple of 32, take 2.25 times fewer products
    (:func:`fastjac.ops.winograd`), in the forward and the backward.

    Has the model's modules, parameters, buffers, attributes and methods: the same state dict, training
    either trains both, what is assigned to one is the other's. Takes and returns what the model does.
    The same outputs and gradients (to rounding), in train and eval mode; running statistics are updated
    alike. Fuses BatchNorm with ReLU, ReLU6, LeakyReLU or SiLU, max-pools of 2x2 (stride 2) and 3x3
    (stride 2, padding 0 or 1). A chain that branches or that a hook looks into is computed where it is
    read. A forward hook that keeps a BatchNorm's output for ``autograd.grad`` should ask it to
    ``retain_grad()``, or it is no part of the graph. Differentiable once. Deterministic where the rest
    of the network is. Under ``torch.compile``, also of the backward (compiled autograd), under
    ``torch.utils.checkpoint``, with TorchScript parts and on a device without native operators, the
    model runs as it is. Another thread, a TorchScript function, ``Tensor.as_subclass`` or a C++
    extension that reads a BatchNorm's output sees a NaN placeholder. :meth:`FusedModel.unfuse` gives
    the model back.

    >>> import torch
    >>> layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> model = torch.nn.Sequential(*layers, torch.nn.MaxPool2d(2))
    >>> fastjac.fuse(model)(torch.rand(2, 3, 18, 18)).shape
    torch.Size([2, 8, 8, 8])

    Raises :class:`fastjac.errors.FastjacError` for a model that is fused already, and a backward with
    ``create_graph=True``.
    """
    if not isinstance(model, nn.Module):
        raise FastjacError(f"fuse: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, FusedModel):
        raise FastjacError("fuse: the model is fused already")
    return FusedModel(model)


# The dictionaries and sets of every module.
_CONTAINERS = [name for name, x in nn.Module().__dict__.items() if isinstance(x, dict | set)]


class FusedModel(nn.Module):
    """What :func:`fuse` gives; see there."""

    def __init__(self, model: nn.Module) -> None:
        # The model's own containers, which PyTorch reads here; all else is asked of the model.
        self.__dict__.update({name: model.__dict__[name] for name in _CONTAINERS}, _model=model)

    def __getattr__(self, name: str) -> Any:
        if "_model" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = type(self._model).__call__
        if own is nn.Module.__call__:
            return super().__call__(*args, **kwargs)
        return self._run(functools.partial(own, self._model), *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Without the model's hooks, which are the fused model's and have fired.
        return self._run(self._model.forward, *args, **kwargs)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model = self._model
        if torch.compiler.is_compiling() or active_fusion() is not None or runs_unfused(model):
            return function(*args, **kwargs)
        with eager_regions(), Fusion(ALL_ACTIVATIONS):
            return function(*args, **kwargs)

    def unfuse(self) -> nn.Module:
        """The model that was fused, with the parameters it has now."""
        return self._model
