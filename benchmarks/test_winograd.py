"""winograd and its derivatives against PyTorch's convolution, channels-last, on a CPU.

The maps of VGG-9 and ResNet-18 at 224², of VGG-4 at 32², and of a crop. The time is that of the
products, not of the bytes moved: x, the weight and y, once each.
"""

from __future__ import annotations

import pytest
import torch

from fastjac.ops import winograd, winograd_ref, winograd_weight, winograd_weight_ref

LAST = torch.channels_last
SHAPES = [  # batch, channels, filters, side
    (8, 64, 128, 112),
    (8, 256, 256, 56),
    (8, 512, 512, 28),
    (8, 512, 512, 14),
    (8, 64, 64, 56),
    (8, 128, 128, 28),
    (8, 256, 256, 14),
    (128, 128, 512, 8),
    (128, 512, 512, 4),
    (8, 64, 64, 19),
    (8, 32, 32, 56),
]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def arguments(shape):
    torch.manual_seed(0)
    batch, channels, filters, side = shape
    x = torch.randn(batch, channels, side, side).to(memory_format=LAST)
    weight = torch.randn(filters, channels, 3, 3).to(memory_format=LAST)
    return x, weight, torch.randn(batch, filters, side, side).to(memory_format=LAST)


def close(got, expected) -> None:
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@SHAPE
@pytest.mark.parametrize("adjoint", [False, True], ids=["y", "gx"])
def test_winograd(measure, shape, adjoint):
    x, weight, gy = arguments(shape)
    args = (gy if adjoint else x, weight, None, (1, 1), adjoint)
    close(winograd(*args), winograd_ref(*args))
    convolution = {"convolution": lambda: winograd_ref(*args)}
    bytes_moved = x.nbytes + weight.nbytes + gy.nbytes
    measure("cpu", bytes_moved, lambda: winograd(*args), convolution)


@SHAPE
def test_winograd_weight(measure, shape):
    x, weight, gy = arguments(shape)
    args = (gy, x, weight)
    close(winograd_weight(*args), winograd_weight_ref(*args))
    convolution = {"convolution": lambda: winograd_weight_ref(*args)}
    bytes_moved = x.nbytes + weight.nbytes + gy.nbytes
    measure("cpu", bytes_moved, lambda: winograd_weight(*args), convolution)
