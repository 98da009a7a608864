"""The operators' bindings and kernels on a device, and the faults that only a device shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import host_device
import instantiations
import pytest
import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops import (
    attention_window,
    attention_window_slope,
    batch_norm_statistics,
    channel_statistics,
    jacobian_match,
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_pushforward,
    window_crop,
)

# Each instantiation of a kernel is for tests/cuda_executor; here, each path through a binding.
CALLS = [call for call in instantiations.CALLS if call.dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_matches_the_reference(call):
    before = host_device.launches()
    for name, (got, expected) in instantiations.run(call, "host").items():
        assert got.device.type == "host"
        got = got.cpu()
        if not got.is_floating_point():
            assert torch.equal(got, expected), name
            continue
        eps = torch.finfo(got.dtype).eps
        error = (got.double() - expected).abs().max()
        assert error <= 8 * eps * expected.abs().max(), name
    assert host_device.launches() > before


def maps(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 2 * 8 * 6 * 6, dtype=dtype).view(2, 8, 6, 6).to(device)


def channels(device: str) -> Tensor:
    return torch.linspace(0.5, 1, 8).to(device)


def corners(device: str) -> Tensor:
    return torch.tensor([[1, 2], [-1, 3]]).to(device)


def moments(device: str) -> tuple[None, None, Tensor, Tensor]:
    """No weight, no bias, and statistics."""
    return None, None, channels(device), channels(device)


# Each operator and its arguments, on a device.
OPERATORS: dict[str, Callable[[str], Callable[[], Any]]] = {
    "attention_window": lambda d: partial(attention_window, maps(d), 3),
    "attention_window_slope": lambda d: partial(attention_window_slope, maps(d), corners(d), 3),
    "batch_norm_statistics": lambda d: partial(
        batch_norm_statistics, maps(d), channels(d), channels(d), True
    ),
    "channel_statistics": lambda d: partial(channel_statistics, maps(d)),
    "jacobian_match": lambda d: partial(jacobian_match, maps(d), maps(d).square()),
    "norm_act_pool": lambda d: partial(norm_act_pool, maps(d), None, *moments(d)),
    "norm_act_pool_backward": lambda d: partial(
        norm_act_pool_backward, maps(d), maps(d), maps(d), *moments(d)
    ),
    "norm_act_pool_pushforward": lambda d: partial(
        norm_act_pool_pushforward, maps(d), None, maps(d), maps(d), None, *moments(d)
    ),
    "window_crop": lambda d: partial(window_crop, maps(d), corners(d), (3, 4), -1.0),
}
EVERY_OPERATOR = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def tensors(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [x for x in results if x is not None]


@EVERY_OPERATOR
def test_runs_on_the_device_of_its_tensors_and_never_waits(operator):
    """Which is not the current one."""
    assert torch.ops.host_device.current_device() == 0
    wanted, call = tensors(operator("cpu")()), operator("host:1")
    before = host_device.launches()
    with host_device.no_synchronisation():
        got = tensors(call())
    assert host_device.launches() > before
    for x, expected in zip(got, wanted, strict=True):
        assert str(x.device) == "host:1"
        torch.testing.assert_close(x.cpu(), expected, rtol=1e-5, atol=1e-5)


@EVERY_OPERATOR
def test_a_missing_guard_is_an_error(operator):
    call = operator("host:1")
    with (
        host_device.no_guards(),
        pytest.raises(RuntimeError, match="launched on device 0, for tensors of device 1"),
    ):
        call()
    call()


@pytest.mark.parametrize("operator", ["channel_statistics", "jacobian_match"])
def test_a_wrong_launch_is_an_error(operator):
    call = OPERATORS[operator]("host")
    with (
        host_device.wrong_launches(),
        pytest.raises(RuntimeError, match="indexes beyond the bounds of an array"),
    ):
        call()
    call()


@pytest.mark.parametrize("elsewhere", ["cpu", "host:1"])
@pytest.mark.parametrize(
    "operator", sorted(OPERATORS.keys() - {"attention_window", "channel_statistics"})
)
def test_a_tensor_left_elsewhere_is_an_error(operator, elsewhere):
    """Of those operators that have several."""
    call = OPERATORS[operator]("host")
    last = max(i for i, x in enumerate(call.args) if isinstance(x, Tensor))
    args = list(call.args)
    args[last] = args[last].to(elsewhere)
    with pytest.raises(FastjacError, match="device"):
        call.func(*args)
