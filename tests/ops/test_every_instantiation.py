"""Every instantiation of the CUDA kernels, by the smallest calls that launch it."""

from __future__ import annotations

import instantiations
import kernels
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastjac.ops import _library


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


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_the_gpu_runs_all_that_the_library_holds(device):
    """As its profiler sees it."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for call in instantiations.CALLS:
            instantiations.run(call, device)
        torch.cuda.synchronize()
    ran = {kernels.without_parameters(e.name) for e in profiled.events() if "fastjac::" in e.name}
    assert ran == {*kernels.readable(kernels.registered(_library.CUDA.path))}
