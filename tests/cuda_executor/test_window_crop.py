"""window_crop's device code, as the operator launches it, against the reference, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastjac.ops import window_crop_adjoint_ref, window_crop_ref
from fastjac.ops.window_crop import empty_crop

pytestmark = pytest.mark.check

LAST = torch.channels_last
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
FAR = 2**63 - 1
# Inside, over each edge and corner, touching from outside, and at the ends of int64.
STARTS = [(0, 0), (2, 3), (-2, 1), (1, -3), (5, 6), (-4, 0), (0, 9), (FAR, 1), (0, -FAR - 1)]


def run(executor, x: Tensor, start: Tensor, size, fill=0.0, *, adjoint=False, seed=0) -> Tensor:
    """What the device code gives, with the operator's description of the crop."""
    out = empty_crop(x, size).fill_(math.nan)
    batch, channels, height, width = x.shape
    last = not out.is_contiguous() or (channels > 1 and out.stride(1) == 1)
    unit, planes = (channels, 1) if last else (1, channels)
    strides = (x.stride(0), 0 if last else x.stride(1), x.stride(2), x.stride(3))
    crop = (batch, planes, *size, unit, height, width, *strides, x.stride(1) if last else 1)
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    fill_bits = torch.tensor(fill, dtype=x.dtype).view(bits).item() % 2 ** (8 * x.element_size())
    assert executor.window_crop(
        x.element_size(),
        x.data_ptr(),
        elements,
        start.data_ptr(),
        fill_bits,
        out.data_ptr(),
        (*crop, int(adjoint)),
        seed,
    )
    return out


def same(got: Tensor, expected: Tensor) -> None:
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def both(executor, x: Tensor, start: Tensor, size: tuple[int, int], seed: int = 0) -> None:
    for fill in (0.0, -math.inf):
        got = run(executor, x, start, size, fill, seed=seed)
        same(got, window_crop_ref(x, start, size, fill))
    got = run(executor, x, start, size, adjoint=True, seed=seed)
    same(got, window_crop_adjoint_ref(x, start, size))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("size", [(4, 5), (1, 1), (7, 8), (3, 64)], ids=str)
@DTYPES
def test_matches_the_reference(executor, dtype, size, channels, layout):
    x = torch.randn(len(STARTS), channels, 7, 9).to(dtype).to(memory_format=layout)
    both(executor, x, torch.tensor(STARTS), size, seed=channels)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
def test_several_blocks_for_a_plane(executor, layout):
    x = torch.randn(2, 24, 30, 28).to(memory_format=layout)
    both(executor, x, torch.tensor([[3, 4], [-7, 20]]), (26, 24))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_views_are_read_in_place(executor, offset):
    room = torch.randn(offset + 2 * 8 * 12 * 12)[offset:]
    assert (room.data_ptr() % 16 != 0) == bool(offset)
    x, last = room.view(2, 8, 12, 12), room.view(2, 12, 12, 8).permute(0, 3, 1, 2)
    start = torch.tensor([[0, 0], [-2, 3]])
    for view in (
        x[:, :, 2:9, 1:8],
        x[:, ::2],
        x[:, :, ::2, ::3],
        last[:, 1:4],
        last[:, :, 2:9, 1:8],
    ):
        both(executor, view, start, (6, 8))
