"""Values that autograd need not save: what it saves anyway recomputes them, and cheaply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastjac.errors import FastjacError

Recompute = Callable[[], Tensor]

# The most products per output of a first convolution that is recomputed (ResNet's has 147): they take
# a few times as long as reading the output does. And the least growth from its input to its output.
_PRODUCTS = 160
_GROWTH = 2


def recompute_convolution(
    value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Recompute | None:
    """How to recompute ``value = conv2d(x, weight, bias)``; None if it has to be saved.

    A network's first convolution gives its largest map, of few products, from an image that is saved
    anyway and has no gradient. Bit for bit the same where PyTorch's convolution is deterministic.
    """
    products = weight.shape[1:].numel()
    if x.requires_grad or value.dim() != 4 or products > _PRODUCTS:
        return None
    node = value.grad_fn
    if node is None or node.name() != "ConvolutionBackward0":
        return None
    stride = node._saved_stride
    if weight.shape[0] < _GROWTH * x.shape[1] * stride[0] * stride[-1]:
        return None
    # Autograd saves no bias. The copy is what was added, even if the parameter changes later.
    bias = None if bias is None else bias.detach().to(value.dtype, copy=True)
    device = value.device.type

    def recompute() -> Tensor:
        geometry = (node._saved_stride, node._saved_padding, node._saved_dilation)
        rest = (node._saved_transposed, node._saved_output_padding, node._saved_groups)
        # The saved tensors have been cast.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return torch.convolution(node._saved_input, node._saved_weight, bias, *geometry, *rest)

    return recompute


@contextmanager
def recomputing(values: list[tuple[Tensor, Recompute]]) -> Iterator[None]:
    """Within, autograd saves how to recompute these values in the place of them."""
    if not values or not torch._C._autograd._saved_tensors_hooks_is_enabled():
        yield
        return
    outer = _active()
    _state.active = active = {_identity(value): recompute for value, recompute in values}
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: active.get(_identity(tensor)) or (tensor, version_of(tensor)),
            lambda saved: _unchanged(*saved) if isinstance(saved, tuple) else saved(),
        ):
            yield
    finally:
        _state.active = outer


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """A saved tensor; with hooks, autograd itself no longer sees that it was overwritten."""
    if version_of(tensor) != version:
        raise FastjacError(
            f"a tensor {list(tensor.shape)} that the backward needs was overwritten in place, or is a "
            "parameter that an optimizer has changed since the forward; expected the operation that is "
            "not in place, and the backward before the step"
        )
    return tensor


def version_of(tensor: Tensor) -> int:
    """How many in-place operations the tensor has seen; inference tensors do not count them."""
    return 0 if tensor.is_inference() else tensor._version


_state = threading.local()


def _active() -> dict[tuple[Any, ...], Recompute]:
    return getattr(_state, "active", {})


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Storage, version, type, shape and strides: what makes two tensors the same value."""
    if tensor.is_inference():
        return (id(tensor),)
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()
