"""jacobian_match's device code, as the operator launches it, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastjac.ops import jacobian_match_ref

pytestmark = pytest.mark.check

NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
STEP = 256 * 16  # elements that a block takes at least


def jacobians(batch: int, n: int, dtype: torch.dtype, *, unaligned=False, seed=0):
    """Two batches; ``unaligned``: each begins one element after a boundary of 16 bytes."""
    make = torch.Generator().manual_seed(seed)
    pair = []
    for _ in range(2):
        room = torch.empty(batch * n + 1, dtype=dtype)
        x = room[1:] if unaligned else room[:-1]
        pair.append(x.view(batch, n).copy_(torch.randn(batch, n, generator=make)))
        assert (x.data_ptr() % 16 != 0) == unaligned
    return pair


def run(executor, js: Tensor, jt: Tensor, normalize: bool, *, eps=1e-12, seed=0, v=None):
    """The device code's loss and v, and how many chunks it cut a sample into."""
    v = torch.empty_like(js) if v is None else v
    v.fill_(torch.nan)
    acc = torch.float64 if js.dtype == torch.float64 else torch.float32
    loss = torch.full(js.shape[:1], torch.nan, dtype=acc)
    dtype = str(js.dtype).removeprefix("torch.")
    pointers = [x.data_ptr() for x in (js, jt, v, loss)]
    chunks = executor.jacobian_match(dtype, *pointers, *js.shape, normalize, eps, seed)
    return loss, v, chunks


def errors(loss: Tensor, v: Tensor, js: Tensor, jt: Tensor, *args) -> tuple[float, float]:
    """Relative errors of loss (root mean square over samples) and v, against float64."""
    expected_loss, expected_v = jacobian_match_ref(js.double(), jt.double(), *args)
    relative = (loss.double() - expected_loss) / expected_loss
    of_v = (v.double() - expected_v).norm() / expected_v.norm()
    return relative.square().mean().sqrt().item(), of_v.item()


@NORMALIZE
@DTYPES
@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("n", [2, 7, 8, 1000, STEP - 8, STEP, STEP + 1, 2 * STEP + 24])
def test_matches_the_reference(executor, n, unaligned, dtype, normalize):
    js, jt = jacobians(3, n, dtype, unaligned=unaligned)
    loss, v, chunks = run(executor, js, jt, normalize, seed=n)
    assert chunks == -(-n // STEP)
    got = errors(loss, v, js, jt, normalize)
    allowed = errors(*jacobian_match_ref(js, jt, normalize), js, jt, normalize)
    for error, reference in zip(got, allowed, strict=True):
        assert error <= 2 * reference + 20 * torch.finfo(loss.dtype).eps


def test_more_chunks_than_threads(executor):
    n = 300 * STEP + 5
    js, jt = jacobians(1, n, torch.float32)
    loss, v, chunks = run(executor, js, jt, True)
    assert chunks == 301
    assert max(errors(loss, v, js, jt)) < 1e-6


def test_only_v_needs_no_alignment(executor):
    js, jt = jacobians(2, 64, torch.float32)
    v = torch.empty(129)[1:].view(2, 64)
    loss, v, _ = run(executor, js, jt, True, v=v)
    assert max(errors(loss, v, js, jt)) < 1e-6


@NORMALIZE
@DTYPES
def test_any_order_of_threads_and_blocks_gives_the_same_bits(executor, dtype, normalize):
    js, jt = jacobians(3, 2 * STEP + 8, dtype)
    first, *others = (run(executor, js, jt, normalize, seed=seed)[:2] for seed in range(6))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@NORMALIZE
@DTYPES
def test_agreement_gives_exactly_zero(executor, dtype, normalize):
    js, _ = jacobians(2, STEP + 3, dtype)
    loss, v, _ = run(executor, js, 4 * js if normalize else js.clone(), normalize)
    assert loss.count_nonzero() == 0
    assert v.count_nonzero() == 0


@NORMALIZE
def test_clamped_and_zero_norms(executor, normalize):
    js, jt = jacobians(6, 100, torch.float64)
    js[::2] *= 0.5
    jt[:3] *= 0.1
    js[4] = jt[5] = 0
    loss, v, _ = run(executor, js, jt, normalize, eps=8.0)
    expected = jacobian_match_ref(js, jt, normalize, 8.0)
    torch.testing.assert_close((loss, v), expected, rtol=1e-12, atol=1e-14)
