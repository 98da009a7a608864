"""Where large results are in memory on a CPU: aligned, ordinary tensors else."""

from __future__ import annotations

import gc

import pytest
import torch

from fastjac.ops import norm_act_pool, norm_act_pool_ref, window_crop, window_crop_ref
from fastjac.ops.winograd import winograd, winograd_ref

SHAPE = (2, 33, 70, 67)  # 1.2 MiB in float32
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def own_memory(t: torch.Tensor) -> bool:
    """Whether its memory is not PyTorch's allocator's, which could resize it."""
    return not t.untyped_storage().resizable()


def large(layout: torch.memory_format) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(SHAPE).to(memory_format=layout)
    assert x.numel() * x.element_size() > 2**20
    return x


def crop(x: torch.Tensor) -> torch.Tensor:
    return window_crop(x, torch.tensor([[0, 1], [-1, 2]]), (69, 66))


def crop_ref(x: torch.Tensor) -> torch.Tensor:
    return window_crop_ref(x, torch.tensor([[0, 1], [-1, 2]]), (69, 66))


def chain(x: torch.Tensor, f=norm_act_pool) -> torch.Tensor:
    ones = torch.ones(x.shape[1])
    return f(x, None, ones, ones, ones * 0, ones, "relu", 0.0, "none")


def chain_ref(x: torch.Tensor) -> torch.Tensor:
    return chain(x, norm_act_pool_ref)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("f", "ref"), [(crop, crop_ref), (chain, chain_ref)])
def test_a_large_result_has_the_reference_s_values_and_strides(f, ref, layout):
    x = large(layout)
    got, expected = f(x), ref(x)
    assert own_memory(got) > own_memory(expected)
    assert got.stride() == expected.stride()
    assert got.data_ptr() % 64 == 0
    torch.testing.assert_close(got, expected)
    assert not own_memory(f(x[:, :1]))  # small


def test_a_large_convolution_is_aligned():
    x = large(torch.channels_last)
    weight = torch.randn(40, SHAPE[1], 3, 3)
    got = winograd(x, weight)
    assert own_memory(got)
    assert got.stride() == winograd_ref(x, weight).stride()
    assert got.data_ptr() % 64 == 0
    torch.testing.assert_close(got, winograd_ref(x, weight), rtol=1e-4, atol=1e-4)


def test_a_large_result_outlives_what_it_was_made_with():
    x = large(torch.channels_last)
    expected = crop_ref(x)
    view = crop(x)[1:, 3:]
    assert own_memory(view)
    del x
    gc.collect()
    others = [torch.randn(SHAPE) for _ in range(4)]  # would overwrite what was let go
    torch.testing.assert_close(view, expected[1:, 3:], rtol=0, atol=0)
    assert len(others) == 4


def test_a_large_result_can_be_written_shared_and_copied_like_any_other():
    y = crop(large(torch.contiguous_format))
    assert own_memory(y)
    expected = y.clone()
    assert torch.equal(y.share_memory_(), expected)
    y.add_(1)
    torch.testing.assert_close(y, expected + 1)
    assert torch.equal(torch.from_numpy(y.numpy().copy()), y)
