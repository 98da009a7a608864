"""The loss terms against their equations, one sample and one number at a time."""

import math

import pytest
import torch
from torch import Tensor

from fastjac import (
    FastjacError,
    activation_match_loss,
    attention_match_loss,
    jacobian_match_loss,
    reference,
)


def pair(*shape: int, teacher: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=make).double() for s in (shape, teacher or shape))


def unit(values: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((s - t) ** 2 for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("loss", [jacobian_match_loss, reference.jacobian_match_loss])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_jacobian_match(loss, normalize):
    js, jt = pair(4, 3, 5, 6)
    samples = zip(js.flatten(1).tolist(), jt.flatten(1).tolist(), strict=True)
    scale = unit if normalize else list
    expected = sum(squared_distance(scale(s), scale(t)) for s, t in samples) / 4
    assert loss(js, jt, normalize).item() == pytest.approx(expected, rel=1e-13)


def test_the_jacobian_loss_is_normalised_unless_told():
    js, jt = pair(4, 3, 5, 6)
    assert jacobian_match_loss(js, jt) == jacobian_match_loss(js, jt, True)
    assert jacobian_match_loss(7 * js, jt).item() == pytest.approx(
        jacobian_match_loss(js, jt).item()
    )


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_jacobian_matchs_gradient(normalize):
    js, jt = pair(3, 2, 3, 4)
    js.requires_grad_()
    assert torch.autograd.gradcheck(lambda js: jacobian_match_loss(js, jt, normalize), js)
    got, expected = (
        torch.autograd.grad(f(js, jt, normalize), js)[0]
        for f in (jacobian_match_loss, reference.jacobian_match_loss)
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_activation_match():
    ls, lt = pair(4, 7)
    samples = zip(ls.tolist(), lt.tolist(), strict=True)
    expected = sum(squared_distance(s, t) for s, t in samples) / 4
    assert activation_match_loss(ls, lt).item() == pytest.approx(expected, rel=1e-13)


def test_attention_match():
    fs, ft = pair(3, 4, 5, 6, teacher=(3, 2, 5, 6))
    maps = [
        [
            [
                sum(f[b, c, i, j].item() ** 2 for c in range(f.shape[1])) / f.shape[1]
                for i in range(5)
                for j in range(6)
            ]
            for b in range(3)
        ]
        for f in (fs, ft)
    ]
    expected = sum(squared_distance(unit(s), unit(t)) for s, t in zip(*maps, strict=True)) / 3
    assert attention_match_loss(fs, ft).item() == pytest.approx(expected, rel=1e-13)
    assert attention_match_loss(fs, -9 * fs).item() == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize(
    ("loss", "shape"), [(activation_match_loss, (3, 4)), (attention_match_loss, (2, 3, 3, 2))]
)
def test_the_others_differentiate_in_both_to_any_order(loss, shape):
    both = tuple(t.requires_grad_() for t in pair(*shape))
    assert torch.autograd.gradcheck(loss, both)
    assert torch.autograd.gradgradcheck(loss, both)


def test_dead_features_give_a_finite_loss_and_gradient():
    fs, ft = pair(2, 3, 4, 4)
    fs[0] = 0
    loss = attention_match_loss(fs.requires_grad_(), ft)
    loss.backward()
    assert loss.isfinite()
    assert fs.grad.isfinite().all()
    assert fs.grad[1].norm() > 0


@pytest.mark.parametrize(
    ("loss", "shapes", "message"),
    [
        (activation_match_loss, ((3, 4), (3, 5)), r"activation_match_loss: .*\[3, 4\].*\[3, 5\]"),
        (activation_match_loss, ((3,), (3,)), "activation_match_loss: .*with 2 dimensions"),
        (
            attention_match_loss,
            ((2, 3, 4, 4), (2, 3, 5, 4)),
            r"\[2, 4, 4\] and teacher \[2, 5, 4\]",
        ),
        (
            attention_match_loss,
            ((2, 3, 4, 4), (1, 3, 4, 4)),
            r"\[2, 4, 4\] and teacher \[1, 4, 4\]",
        ),
        (attention_match_loss, ((3, 4), (3, 4)), "attention_match_loss .*with 3 dimensions"),
        (jacobian_match_loss, ((2, 3), (2, 4)), r"jt must have js's shape, \[2, 3\], got \[2, 4\]"),
        (
            reference.jacobian_match_loss,
            ((2, 3), (2, 4)),
            r"differ in shape: \[2, 3\] and \[2, 4\]",
        ),
    ],
)
def test_shapes(loss, shapes, message):
    with pytest.raises(FastjacError, match=message):
        loss(*map(torch.zeros, shapes))
