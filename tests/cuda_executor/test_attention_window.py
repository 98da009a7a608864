"""attention_window's device code, as the operator launches it, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastjac.ops import attention_window_ref, attention_window_slope_ref

pytestmark = pytest.mark.check

LAST = torch.channels_last
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"]
)
POWERS = pytest.mark.parametrize("power", [1, 2, 3])
# Around the vectors and lanes of pixels and channels, the rows of a block, and its threads.
SHAPES = pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((3, 5, 1, 1), 1),
        ((2, 7, 9, 5), 3),
        ((2, 16, 8, 16), 8),
        ((1, 33, 6, 17), 2),
        ((2, 70, 4, 4), 1),
        ((1, 300, 4, 8), 2),
        ((1, 3, 270, 9), 5),
        ((1, 2, 4, 300), 3),
    ],
    ids=str,
)


def features(shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=make, dtype=torch.float64).to(dtype).to(memory_format=layout)
    )


def find(executor, z: Tensor, k: int, power: float = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    position = torch.full((len(z), 2), -9)
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    value = torch.full((len(z),), math.nan, dtype=acc)
    shape = (*z.shape, k, int(not z.is_contiguous()))
    pointers = [x.data_ptr() for x in (z, position, value)]
    dtype = str(z.dtype).removeprefix("torch.")
    assert executor.attention_window(dtype, *pointers, shape, power, seed)
    return position, value


def slope(executor, z: Tensor, position: Tensor, k: int, power: float, seed: int = 0):
    """Slope and bend, with the operator's description of the crop."""
    last = not z.is_contiguous()
    batch, channels, height, width = z.shape
    unit, planes = (channels, 1) if last else (1, channels)
    strides = (z.stride(0), 0 if last else z.stride(1), z.stride(2))
    pixel = z.stride(3) if width > 1 else unit
    crop = (
        batch,
        planes,
        k,
        k,
        unit,
        height,
        width,
        *strides,
        pixel,
        z.stride(1) if last else 1,
        0,
    )
    results = [torch.empty_like(z[:, :, :k, :k]).fill_(math.nan) for _ in range(2)]
    pointers = [x.data_ptr() for x in (position, *results)]
    dtype = str(z.dtype).removeprefix("torch.")
    assert executor.attention_window_slope(
        dtype, z.data_ptr(), z.numel(), *pointers, crop, channels, power, seed
    )
    return results


@POWERS
@LAYOUTS
@DTYPES
@SHAPES
def test_matches_the_reference(executor, shape, k, dtype, layout, power):
    z = features(shape, dtype, layout)
    position, value = find(executor, z, k, power, seed=k)
    expected = attention_window_ref(z.double(), k, power)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(value.double(), expected[1], rtol=tolerance, atol=0)
    assert torch.equal(position, expected[0])

    got = slope(executor, z, position, k, power, seed=k)
    expected = attention_window_slope_ref(z.double(), position, k, power)
    eps = 4 * torch.finfo(dtype).eps
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=eps, atol=eps * y.abs().max())


@LAYOUTS
def test_an_unaligned_map(executor, layout):
    for dtype in (torch.float32, torch.float16):
        z = features((2, 16, 8, 8), dtype, layout)
        odd = torch.zeros(z.numel() + 1, dtype=dtype)[1:].as_strided(z.shape, z.stride(), 1)
        assert odd.data_ptr() % 16
        odd.copy_(z)
        for got, expected in zip(find(executor, odd, 3), find(executor, z, 3), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        position, _ = find(executor, z, 3)
        got = slope(executor, odd, position, 3, 2)
        for x, y in zip(got, slope(executor, z, position, 3, 2), strict=True):
            assert torch.equal(x, y)


@LAYOUTS
def test_of_equal_windows_the_first_is_found(executor, layout):
    z = torch.zeros(1, 4, 20, 300).to(memory_format=layout)
    assert find(executor, z, 3)[0].tolist() == [[0, 0]]
    for row, column in (
        (15, 290),
        (7, 295),
        (7, 12),
        (2, 297),
    ):  # each before the last in row order
        z[0, 1, row, column] = 2.0
        for seed in range(2):
            assert find(executor, z, 3, seed=seed)[0].tolist() == [[row - 2, column - 2]]


@LAYOUTS
def test_nan_and_inf_as_in_argmax(executor, layout):
    z = features((3, 6, 20, 50), torch.float32, layout)
    z[0, 2, 10, 40] = math.nan
    z[1, 3, 10, 30] = math.inf
    z[2, 3, 10, 30], z[2, 0, 15, 5], z[2, 1, 19, 49] = -math.inf, math.nan, math.nan
    position, value = find(executor, z, 3)
    expected = attention_window_ref(z, 3)
    assert torch.equal(position, expected[0])
    torch.testing.assert_close(value, expected[1], equal_nan=True, rtol=1e-6, atol=0)


@DTYPES
@LAYOUTS
def test_any_order_of_threads_and_blocks_gives_the_same_bits(executor, dtype, layout):
    z = features((2, 70, 12, 12), dtype, layout)
    first, *others = (find(executor, z, 5, seed=seed) for seed in range(4))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
