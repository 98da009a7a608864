"""Values that autograd need not keep: what it keeps anyway makes them again, and cheaply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[[], Tensor]

# Of a first convolution that is made again: the most products for an output (ResNet's has 147), which
# take a few times as long as the output takes to read, and the least that it is larger than its input.
_PRODUCTS = 160
_GROWTH = 2


def convolution_maker(module: nn.Conv2d, value: Tensor) -> Maker | None:
    """How to make ``value``, the module's output, again; None if it has to be kept.

    A network's first convolution gives its largest map, of few products, from an image that is kept
    anyway and has no gradient. It is made bit for bit where PyTorch's convolution is deterministic.
    """
    filters, channels = module.out_channels, module.in_channels
    growth = filters / (channels * module.stride[0] * module.stride[1])
    kept = value.grad_fn
    if kept.name() != "ConvolutionBackward0" or kept.next_functions[0][0] is not None:
        return None
    if growth < _GROWTH or module.weight.numel() > _PRODUCTS * filters:
        return None
    # Autograd keeps no bias. The copy is what was added, whatever becomes of the module's.
    bias = None if module.bias is None else module.bias.detach().to(value.dtype, copy=True)
    device = value.device.type

    def make() -> Tensor:
        geometry = (kept._saved_stride, kept._saved_padding, kept._saved_dilation)
        rest = (kept._saved_transposed, kept._saved_output_padding, kept._saved_groups)
        # What is kept has been cast.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return torch.convolution(kept._saved_input, kept._saved_weight, bias, *geometry, *rest)

    return make


@contextmanager
def recomputing(makers: list[tuple[Tensor, Maker]]) -> Iterator[None]:
    """While it lasts, autograd keeps how to make these values, not them."""
    if not makers:
        yield
        return
    outer = _known()
    _here.known = known = {_identity(value): make for value, make in makers}
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: known.get(_identity(tensor), tensor),
            lambda kept: kept if isinstance(kept, Tensor) else kept(),
        ):
            yield
    finally:
        _here.known = outer


def maker_of(value: Tensor) -> Maker | None:
    """How to make ``value`` again, where :func:`recomputing` has it."""
    return _known().get(_identity(value))


_here = threading.local()


def _known() -> dict[tuple[Any, ...], Maker]:
    return getattr(_here, "known", {})


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory, seen how, and as of which in-place operation."""
    if tensor.is_inference():
        return (id(tensor),)
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()
