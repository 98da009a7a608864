"""Maps of more than 2^31 elements: what lies at their end is read, and written, where it belongs."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch

from fastjac.ops import (
    attention_window,
    attention_window_slope,
    channel_statistics,
    jacobian_match,
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_pushforward,
)
from fastjac.ops.winograd import winograd

pytestmark = [pytest.mark.check, pytest.mark.serial]

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
SHAPE = (1, 32, 8192, 8193)


@pytest.fixture(autouse=True)
def memory():
    """Four maps in 16 bits, and what is made beside them."""
    gc.collect()
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")) / 2**20
    if available < 18:
        pytest.skip(f"needs 18 GiB of memory, {available:.0f} are available")
    yield
    gc.collect()


def zeros(shape, layout=CONTIGUOUS, dtype=torch.bfloat16):
    assert math.prod(shape) > 2**31
    return torch.empty(shape, dtype=dtype, memory_format=layout).zero_()


def one_hot(like, *at):
    """Three there, and zero elsewhere."""
    x = torch.zeros_like(like)
    x[at] = 3
    return x


@pytest.mark.parametrize(
    ("layout", "pool", "place"),
    [
        (LAST, "none", (-2, -3)),  # four maps of 4 GiB: once is enough
        (CONTIGUOUS, "2x2", (-1, -1)),
        (LAST, "2x2", (-1, -1)),
        (CONTIGUOUS, "3x3", (-1, -2)),
        (LAST, "3x3", (-1, -2)),
    ],
)
def test_norm_act_pool(layout, pool, place):
    u, at = zeros(SHAPE, layout), (0, -1, *place)
    u[0, -1, -2, -3] = 3
    n = u.numel() // 32
    mean, var = channel_statistics(u)
    torch.testing.assert_close(mean[-2:], torch.tensor([0, 3 / n]), rtol=1e-5, atol=0)
    torch.testing.assert_close(var[-2:], torch.tensor([0, 9 / n]), rtol=1e-5, atol=0)

    # a is relu(u), and the gate is closed where u is 0
    identity = (torch.ones(32), torch.zeros(32), torch.zeros(32), torch.ones(32))
    options = (u, None, *identity, "relu", 0.0, pool)
    y = norm_act_pool(*options)
    assert float(y[at]) == float(y.sum()) == 3

    gy = one_hot(y, *at)
    del y
    gu, _, gweight, gbias = norm_act_pool_backward(
        gy, *options, False, None, None, [True, False, True, True]
    )
    assert float(gu[0, -1, -2, -3]) == float(gu.sum()) == 3
    assert gweight.tolist() == [0] * 31 + [9]
    assert gbias.tolist() == [0] * 31 + [3]
    del gu

    tu = one_hot(u, 0, -1, -2, -3)
    ty, gweight, _, _ = norm_act_pool_pushforward(tu, None, gy, *options, "fixed", False)
    assert float(ty[at]) == float(ty.sum()) == 3
    assert gweight.tolist() == [0] * 31 + [9]


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_attention_window(layout):
    channels, side, k = 2049, 1024, 3
    z = zeros((1, channels, side, side), layout)
    z[0, -1, -1, -1] = 3
    position, value = attention_window(z, k)
    assert position.tolist() == [[side - k, side - k]]
    torch.testing.assert_close(value, torch.tensor([9 / (channels * k * k)]))
    slope, _ = attention_window_slope(z, position, k)
    assert int(torch.count_nonzero(slope)) == 1
    torch.testing.assert_close(
        float(slope[0, -1, -1, -1]), 6 / (channels * k * k), rtol=4e-3, atol=0
    )


def test_jacobian_match():
    js = zeros((1, 2**31 + 7))
    js[0, -1] = 3
    loss, v = jacobian_match(js, torch.zeros_like(js), False)
    assert loss.tolist() == [9]
    assert float(v[0, -1]) == float(v.sum()) == 6


def test_winograd():
    x = zeros(SHAPE, LAST, torch.float32)
    x[0, -1, -1, -1] = 3
    weight = torch.arange(288.0).view(1, 32, 3, 3)
    y = winograd(x, weight, None, (1, 1))
    # the last pixel is under the kernels of the four outputs around it
    torch.testing.assert_close(y[0, 0, -2:, -2:], 3 * weight[0, -1, 1:, 1:].flip(0, 1))
