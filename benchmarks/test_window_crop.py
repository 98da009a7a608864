"""window_crop and its adjoint against their PyTorch references.

Crops as the Jacobian's passes take them: of VGG-9's maps at 224², for a window at level 1. Bytes that
must be moved: the window in, as it lies in memory, and the crop out; for the adjoint, the crop in and
the map out.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastjac.ops import (
    window_crop,
    window_crop_adjoint,
    window_crop_adjoint_ref,
    window_crop_ref,
)

SHAPES = [((8, 64, 224, 224), 48), ((8, 128, 112, 112), 24), ((32, 3, 224, 224), 50)]
REFERENCE = "its reference"
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def inputs(shape, side, dtype, layout, device):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout])
    start = torch.randint(-2, shape[2] - side + 2, (shape[0], 2), device=device)
    return x, start


PARAMETERS = [
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize(
        ("shape", "side"), SHAPES, ids=["x".join(map(str, shape)) for shape, _ in SHAPES]
    ),
]


def parametrize(test):
    for mark in PARAMETERS:
        test = mark(test)
    return test


@parametrize
def test_window_crop(measure, filling, window_bytes, device, shape, side, dtype, layout):
    shape = filling(shape, 2 * shape[0] * shape[1] * side * side)
    x, start = inputs(shape, side, dtype, layout, device)
    args = (x, start, (side, side))
    crop = window_crop(*args)
    assert torch.equal(crop, window_crop_ref(*args))
    reference = {REFERENCE: lambda: window_crop_ref(*args)}
    moved = window_bytes(x, start, (side, side)) + crop.nbytes
    measure(device, moved, lambda: window_crop(*args), reference)


@parametrize
def test_window_crop_adjoint(measure, filling, device, shape, side, dtype, layout):
    shape = filling(shape, math.prod(shape))
    x, start = inputs(shape, side, dtype, layout, device)
    crop = window_crop(x, start, (side, side))
    args = (crop, start, x.shape[2:])
    assert torch.equal(window_crop_adjoint(*args), window_crop_adjoint_ref(*args))
    reference = {REFERENCE: lambda: window_crop_adjoint_ref(*args)}
    measure(device, crop.nbytes + x.nbytes, lambda: window_crop_adjoint(*args), reference)
