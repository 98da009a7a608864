"""Where large results are in memory on a CPU, and how they get there: aligned, ordinary tensors else."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from instruction_set import evaluate_on

from fastjac.ops import (
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_pushforward,
    norm_act_pool_ref,
    window_crop,
    window_crop_ref,
)
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


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages"
)
def test_the_pages_of_a_large_result_are_asked_to_be_huge():
    y = chain(torch.ones(1, 8, 1024, 512))  # 16 MiB
    middle = y.data_ptr() + y.nbytes // 2
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            begin, end = (int(x, 16) for x in word.split("-"))
        elif word == "VmFlags:" and begin <= middle < end:
            flags = line.split()[1:]
    assert flags is not None, "the map's memory is not listed"
    assert "hg" in flags


CASES = list(
    itertools.product(
        [torch.float64, torch.float32, torch.bfloat16, torch.float16],
        LAYOUTS,
        [("none", 48, 148), ("2x2", 48, 160), ("3x3", 64, 128), ("3x3-unpadded", 64, 128)]
        + [(pool, 47, 150) for pool in ("none", "2x2", "3x3")],
    )
)


@pytest.mark.parametrize(("dtype", "layout", "case"), CASES)
def test_a_result_beyond_the_caches_has_the_bits_of_its_images(dtype, layout, case):
    """From 32 MiB on a map is written past the caches, if a vector's places in it are aligned."""
    torch.manual_seed(0)
    pool, channels, side = case
    batch = 16 // dtype.itemsize * 2
    shape = (batch, channels, side, side)
    u, residual, tu = (torch.randn(shape).to(dtype).to(memory_format=layout) for _ in range(3))
    assert u.nbytes >= 2**25 > 2 * u[:1].nbytes
    parameters = (torch.linspace(x, 1, channels) for x in (0.5, -1, -0.1, 2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = (*(x.to(wide) for x in parameters), "relu", 0.0, pool)
    gy = torch.randn(norm_act_pool(u, None, *options).shape).to(dtype).to(memory_format=layout)

    def results(images: slice) -> list[torch.Tensor]:
        x, r, g, t = (m[images] for m in (u, residual, gy, tu))
        gradients, alone = [True, True, False, False], [True, False, False, False]
        return [
            norm_act_pool(x, r, *options),
            *norm_act_pool_backward(g, x, r, *options, False, None, None, gradients)[:2],
            norm_act_pool_backward(g, x, None, *options, False, None, None, alone)[0],
            norm_act_pool_pushforward(t, r, g, x, r, *options, "fixed", False)[0],
        ]

    whole = results(slice(None))
    for image in range(batch):
        for got, expected in zip(whole, results(slice(image, image + 1)), strict=True):
            assert torch.equal(got[image : image + 1], expected)


@pytest.mark.check
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_so_it_has_with_any_instruction_set(isa):
    test = test_a_result_beyond_the_caches_has_the_bits_of_its_images.__name__
    done = evaluate_on(isa, __file__, f"len([m.{test}(*case) for case in m.CASES])")
    assert done == str(len(CASES))
