"""Every instantiation of the CUDA kernels, by the smallest calls that launch it."""

from __future__ import annotations

import instantiations
import pytest
import torch


@pytest.mark.parametrize("call", instantiations.CALLS, ids=lambda call: call.name)
def test_matches_the_reference(device, call):
    for name, (got, expected) in instantiations.run(call, device).items():
        assert got.device.type == device
        got = got.cpu()
        if not got.is_floating_point():
            assert torch.equal(got, expected), name
            continue
        eps = torch.finfo(got.dtype).eps
        error = (got.double() - expected).abs().max()
        assert error <= 8 * eps * expected.abs().max(), name
