"""attention_window and its slope against their PyTorch references.

Bytes that must be moved: the features in; for the slope, the window in, as it lies in memory, slope and
bend out.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastjac.ops import (
    attention_window,
    attention_window_ref,
    attention_window_slope,
    attention_window_slope_ref,
)

SHAPES = [((8, 128, 56, 56), 11), ((32, 128, 56, 56), 11), ((8, 64, 56, 56), 11)]
REFERENCE = "its reference"
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
IDS = ["x".join(map(str, shape)) for shape, _ in SHAPES]


def features(shape, dtype, layout, device):
    torch.manual_seed(0)
    return torch.randn(shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=IDS)
def test_attention_window(measure, filling, device, shape, k, dtype, layout):
    z = features(filling(shape, math.prod(shape)), dtype, layout, device)
    position, value = attention_window(z, k)
    expected_position, expected_value = attention_window_ref(z.double(), k)
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=0)
    assert torch.equal(position, expected_position)
    reference = {REFERENCE: lambda: attention_window_ref(z, k)}
    measure(device, z.nbytes, lambda: attention_window(z, k), reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=IDS)
def test_attention_window_slope(measure, filling, window_bytes, device, shape, k, dtype, layout):
    moved = 3 * shape[0] * shape[1] * k * k
    z = features(filling(shape, moved), dtype, layout, device)
    position, _ = attention_window(z, k)
    args = (z, position, k)
    slope, bend = attention_window_slope(*args)
    expected = attention_window_slope_ref(z.double(), position, k)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close((slope.double(), bend.double()), expected, rtol=tolerance, atol=0)
    reference = {REFERENCE: lambda: attention_window_slope_ref(*args)}
    moved = window_bytes(z, position, (k, k)) + slope.nbytes + bend.nbytes
    measure(device, moved, lambda: attention_window_slope(*args), reference)
