"""jacobian_match against its PyTorch reference.

Bytes it must move: js and jt in, v out.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastjac.ops import jacobian_match, jacobian_match_ref

SHAPES = [(8, 3, 224, 224), (32, 3, 224, 224), (128, 3, 32, 32)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_jacobian_match(measure, filling, device, shape, dtype, normalize):
    torch.manual_seed(0)
    shape = filling(shape, 3 * math.prod(shape))
    js, jt = torch.randn(2, *shape, device=device).to(dtype).unbind()

    loss, v = jacobian_match(js, jt, normalize)
    expected_loss, expected_v = jacobian_match_ref(js.double(), jt.double(), normalize)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=0)
    assert (v.double() - expected_v).norm() <= TOLERANCE[dtype] * expected_v.norm()

    reference = {"its reference": lambda: jacobian_match_ref(js, jt, normalize)}
    measure(device, 3 * js.nbytes, lambda: jacobian_match(js, jt, normalize), reference)
