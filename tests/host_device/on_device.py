"""The device itself: that it computes, and that each kind of fault is an error on it."""

from __future__ import annotations

import copy
import io

import host_device
import pytest
import torch
import torch.nn.functional as F


def test_views_and_writes_are_of_one_memory():
    x = torch.zeros(4, 6, device="host")
    x[1:, ::2].t().add_(1)
    expected = torch.zeros(4, 6)
    expected[1:, ::2] = 1
    assert torch.equal(x.cpu(), expected)
    out = torch.empty(0, device="host")
    torch.add(x, 1, out=out)
    assert torch.equal(out.cpu(), expected + 1)


def test_autograd_in_channels_last_and_autocast():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    weight = torch.randn(4, 3, 3, 3)
    found = []
    for device in ("cpu", "host:1"):
        w = weight.clone().to(device).requires_grad_()
        given = x.to(device, memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            y = F.conv2d(given, w, padding=1)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)
        F.batch_norm(y.float(), None, None, training=True).relu().sum().backward()
        found.append(w.grad.cpu())
    assert torch.equal(*found)


def test_models_are_copied_saved_and_loaded():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to("host")
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    for name, value in twin.state_dict().items():
        assert value.device.type == loaded[name].device.type == "host"
        assert torch.equal(value, loaded[name])


def test_what_is_not_yet_written_is_nan():
    assert torch.empty(3, device="host").isnan().all()


def test_numbers_are_drawn_from_its_own_generators():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = [torch.rand(3, device="host"), torch.nn.Dropout()(torch.ones(64, device="host"))]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = [torch.rand(3, device="host"), torch.nn.Dropout()(torch.ones(64, device="host"))]
    assert all(torch.equal(*pair) for pair in zip(drawn, again, strict=True))
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="host", generator=torch.Generator())


def test_a_tensor_left_on_the_cpu_is_an_error():
    x = torch.ones(2, 3, device="host")
    with pytest.raises(RuntimeError, match="cpu"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="cpu"):
        F.linear(x, torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="cpu"):
        torch.cat([x, torch.ones(2, 3)])
    assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.full((2, 3), 2.0))  # as on a GPU


def test_a_tensor_of_another_index_is_an_error():
    with pytest.raises(RuntimeError, match="host:0"):
        F.linear(torch.ones(2, 3, device="host:1"), torch.ones(4, 3, device="host:0"))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1).unique(),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.accelerator.synchronize(),
    ],
    ids=["item", "bool", "cpu", "tolist", "mask", "unique", "nonzero", "equal", "synchronize"],
)
def test_a_synchronisation_is_an_error_where_a_test_says_so(wait):
    x = torch.arange(3.0, device="host")
    wait(x)
    with (
        host_device.no_synchronisation(),
        pytest.raises(RuntimeError, match="the host would wait for the device"),
    ):
        wait(x)
    wait(x)
