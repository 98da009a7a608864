"""channel_statistics against its PyTorch reference.

Bytes it must move: u in.
"""

from __future__ import annotations

import pytest
import torch

from fastjac.ops import channel_statistics, channel_statistics_ref

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channel_statistics(measure, device, maps, layout, dtype):
    u = maps(layout, dtype)
    got, expected = channel_statistics(u), channel_statistics_ref(u.double())
    torch.testing.assert_close([x.double() for x in got], list(expected), rtol=1e-5, atol=1e-5)
    reference = {"its reference": lambda: channel_statistics_ref(u)}
    measure(device, u.nbytes, lambda: channel_statistics(u), reference)
