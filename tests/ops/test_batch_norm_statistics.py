"""batch_norm_statistics against its reference and PyTorch's BatchNorm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastjac import FastjacError
from fastjac.ops import (
    batch_norm_statistics,
    batch_norm_statistics_ref,
    channel_statistics,
    channel_statistics_ref,
)

LAYOUT = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"]
)
DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
# Of one chunk, of several, with vectors of channels and without.
SHAPES = [(4, 21, 40, 33), (2, 64, 7, 9), (40, 3, 1, 1), (3, 16, 64, 64)]


def drawn(device: str, *shape: int, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).to(device)


def running(device: str, channels: int) -> list[Tensor]:
    mean, var = drawn(device, channels, seed=1), drawn(device, channels, seed=2)
    return [mean, var.square() + 0.1]


@LAYOUT
@pytest.mark.parametrize("training", [True, False], ids=["training", "running"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(device, shape, training, layout):
    u = (3 * drawn(device, *shape) - 2).contiguous(memory_format=layout)
    ours, theirs = running(device, shape[1]), running(device, shape[1])
    got = batch_norm_statistics(u, *ours, training, 0.3, 1e-3)
    expected = batch_norm_statistics_ref(u, *theirs, training, 0.3, 1e-3)
    exact = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(got, expected, **exact)
    torch.testing.assert_close(ours, theirs, **exact)
    assert torch.equal(ours[0], running(device, shape[1])[0]) is not training


@DTYPE
@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.float16], ids=str)
def test_updates_what_pytorchs_batch_norm_updates(device, dtype, kept):
    u = (2 * drawn(device, 3, 5, 8, 9) + 1).to(dtype)
    theirs = nn.BatchNorm2d(5, momentum=0.2, dtype=torch.float64, device=device)
    theirs.running_mean, theirs.running_var = (x.to(kept).double() for x in running(device, 5))
    theirs(u.double())
    ours = [x.to(kept) for x in running(device, 5)]
    batch_norm_statistics(u, *ours, True, 0.2)
    tolerance = max(1e-5, 2 * torch.finfo(kept).eps)
    for got, wanted in zip(ours, (theirs.running_mean, theirs.running_var), strict=True):
        assert got.dtype == kept
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_is_channel_statistics_without_running_ones(device):
    u = drawn(device, 3, 5, 8, 9).float()
    mean, invstd = batch_norm_statistics(u, None, None, True, eps=0.25)
    wanted_mean, var = channel_statistics(u)
    assert torch.equal(mean, wanted_mean)
    torch.testing.assert_close(invstd, (var + 0.25).rsqrt())
    only = running(device, 5)[1].float()
    before = only.clone()
    batch_norm_statistics(u, None, only, True, momentum=1.0)
    unbiased = channel_statistics_ref(u.double())[1] * 216 / 215
    torch.testing.assert_close(only.double(), unbiased, rtol=1e-6, atol=0)
    assert not torch.equal(only, before)


def test_the_mean_is_a_tensor_of_its_own(device):
    mean, var = (x.float() for x in running(device, 3))
    got = batch_norm_statistics(drawn(device, 2, 3, 4, 4).float(), mean, var, False)[0]
    mean.zero_()
    assert got.count_nonzero() == 3


def test_strided_running_statistics_are_updated_in_place(device):
    both = torch.stack([x.float() for x in running(device, 4)], 1)
    u = drawn(device, 2, 4, 6, 6).float()
    batch_norm_statistics(u, both[:, 0], both[:, 1], True, momentum=1.0)
    mean, var = channel_statistics_ref(u.double())
    torch.testing.assert_close(
        both.double(), torch.stack([mean, var * 72 / 71], 1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 5), (2, 0, 4, 4)], ids=str)
def test_without_values(device, shape):
    u, kept = torch.zeros(shape, device=device), [x.float() for x in running(device, shape[1])]
    before = [x.clone() for x in kept]
    mean, invstd = batch_norm_statistics(u, *kept, True, eps=0.25)
    assert mean.tolist() == [0] * shape[1]
    assert invstd.tolist() == [2] * shape[1]
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_nan_stays_in_its_channel(device):
    u = drawn(device, 2, 3, 32, 32)
    u[0, 1, 5, 5] = float("nan")
    found = batch_norm_statistics(u, None, None, True)
    expected = batch_norm_statistics_ref(u, None, None, True, 0.1, 1e-5)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=1e-13)


def test_bad_input_is_named(device):
    u = drawn(device, 2, 3, 4, 4).float()
    kept = [x.float() for x in running(device, 3)]

    def refused(message: str, *args, **options) -> None:
        with pytest.raises(FastjacError, match="^batch_norm_statistics: " + message):
            batch_norm_statistics(*args, **options)

    refused(r"u must be \[B, C, H, W\], got \[2, 3\]", u[:, :, 0, 0], None, None, True)
    refused("training=False needs running_mean and running_var", u, kept[0], None, False)
    refused("training needs more than 1 value per channel", u[:1, :, :1, :1], *kept, True)
    refused(r"running_var must be \[3\], got \[2\]", u, kept[0], kept[1][:2], True)
    refused("running_mean must be of a floating dtype", u, kept[0].int(), kept[1], True)
    refused("expected a u without a derivative", u.requires_grad_(), *kept, True)
    u = u.detach()
    with forward_ad.dual_level():
        refused("forward-mode", forward_ad.make_dual(u, torch.ones_like(u)), *kept, True)


@DTYPE
@LAYOUT
def test_opcheck(device, dtype, layout):
    u = drawn(device, 2, 3, 5, 7).to(dtype).contiguous(memory_format=layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = [x.to(wide) for x in running(device, 3)]
    for args in ((u, *kept, True), (u, *kept, False), (u, None, None, True)):
        torch.library.opcheck(
            torch.ops.fastjac.batch_norm_statistics.default,
            (*args, 0.1, 1e-5),
            test_utils=("test_schema", "test_faketensor"),
        )
