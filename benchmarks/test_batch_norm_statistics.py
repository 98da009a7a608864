"""batch_norm_statistics against its PyTorch reference, in training.

Bytes it must move: u in.
"""

from __future__ import annotations

import pytest
import torch

from fastjac.ops import batch_norm_statistics, batch_norm_statistics_ref

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_norm_statistics(measure, device, maps, layout, dtype):
    u = maps(layout, dtype)
    running = [torch.full(u.shape[1:2], x, device=device) for x in (0.0, 1.0)]
    exact = [x.double() for x in running]
    options = (True, 0.1, 1e-5)
    got = (*batch_norm_statistics(u, *running, *options), *running)
    expected = (*batch_norm_statistics_ref(u.double(), *exact, *options), *exact)
    torch.testing.assert_close([x.double() for x in got], list(expected), rtol=1e-5, atol=1e-5)
    reference = {"its reference": lambda: batch_norm_statistics_ref(u, *running, *options)}
    measure(device, u.nbytes, lambda: batch_norm_statistics(u, *running, *options), reference)
