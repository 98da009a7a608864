"""channel_statistics against float64 and against PyTorch's own statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastjac import FastjacError
from fastjac.ops import channel_statistics, channel_statistics_ref

EPS = 1e-5
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
SHAPES = [
    (4, 21, 40, 33),
    (3, 5, 64, 65),
    (40, 3, 1, 1),
    (2, 64, 7, 9),
    (1, 1, 1, 5),
    (2, 3, 200, 1),
]


def normal(*shape: int, device: str, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=make, dtype=torch.float64).to(device)
    assert x.device.type == device
    return x


@LAYOUT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(device, shape, layout):
    u = (3 * normal(*shape, device=device) - 2).contiguous(memory_format=layout)
    got, expected = channel_statistics(u), channel_statistics_ref(u)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@LAYOUT
@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_error_at_most_twice_pytorchs(device, dtype, layout, offset):
    """Of the mean, in units of the deviation; of the variance, relative to it."""
    for shape in SHAPES[:3]:
        u = (normal(*shape, device=device) + offset).to(dtype).contiguous(memory_format=layout)
        expected_mean, expected_var = channel_statistics_ref(u.double())
        theirs = torch.native_batch_norm(u, None, None, None, None, True, 0.1, EPS)[1:]
        theirs = (theirs[0].double(), theirs[1].double() ** -2 - EPS)
        ours = tuple(x.double() for x in channel_statistics(u))
        eps = torch.finfo(channel_statistics(u)[0].dtype).eps

        def errors(statistics, mean=expected_mean, var=expected_var) -> tuple[float, float]:
            mean_error = (statistics[0] - mean) / var.sqrt()
            return mean_error.abs().max().item(), ((statistics[1] - var) / var).abs().max().item()

        for got, allowed in zip(errors(ours), errors(theirs), strict=True):
            assert got <= 2 * allowed + 2 * eps


@LAYOUT
def test_a_large_mean_does_not_cancel(device, layout):
    u = (normal(2, 3, 64, 64, device=device) / 64 + 4096).float().contiguous(memory_format=layout)
    mean, var = channel_statistics(u)
    expected_mean, expected_var = channel_statistics_ref(u.double())
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-5, atol=0)


@LAYOUT
def test_an_outlier_where_the_shift_is_taken(device, layout):
    u = normal(2, 3, 64, 64, device=device).float()
    u[0, :, 0, 0] = 1e4
    mean, var = channel_statistics(u.contiguous(memory_format=layout))
    expected_mean, expected_var = channel_statistics_ref(u.double())
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_channel(device, value):
    for place in (0, 700):
        u = normal(2, 3, 32, 32, device=device)
        u[0, 1].view(-1)[place] = value
        got, expected = channel_statistics(u), channel_statistics_ref(u)
        assert not got[0][1].isfinite()  # an infinity's mean may be NaN, as its variance always is
        assert got[1][1].isnan()
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours[::2], theirs[::2], rtol=1e-12, atol=1e-13)


def test_one_value_has_no_variance(device):
    u = normal(1, 5, 1, 1, device=device).float()
    mean, var = channel_statistics(u)
    assert torch.equal(mean, u.flatten())
    assert var.count_nonzero() == 0


def test_bad_input_is_named():
    with pytest.raises(FastjacError, match=r"^channel_statistics: u must be a tensor, got int"):
        channel_statistics(3)
    with pytest.raises(
        FastjacError, match=r"^channel_statistics: u must be \[B, C, H, W\], got \[3, 4"
    ):
        channel_statistics(torch.zeros(3, 4))
    with pytest.raises(
        FastjacError, match=r"^channel_statistics: u must be one of .*, got torch\.int32"
    ):
        channel_statistics(torch.zeros(1, 2, 3, 4, dtype=torch.int32))
    with pytest.raises(
        FastjacError,
        match=r"^channel_statistics: u must be a strided tensor, got torch\.sparse_coo",
    ):
        channel_statistics(torch.zeros(1, 2, 3, 4).to_sparse())


def test_the_operator_itself_names_bad_input(device):
    u = normal(1, 2, 3, 4, device=device)
    for bad, message in (
        (u.int(), "u must be Double, Float, BFloat16 or Half, got Int"),
        (u[0], r"u must be \[B, C, H, W\], got \[2, 3, 4\]"),
        (u.transpose(2, 3), "u must be contiguous or channels-last"),
    ):
        with pytest.raises(RuntimeError, match="channel_statistics: " + message):
            torch.ops.fastjac.channel_statistics(bad)
