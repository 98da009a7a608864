"""Which scalar is differentiated: the definitions as loops, and where a window stands."""

import math

import pytest
import torch
from torch import Tensor

from fastjac import AttentionWindow, FastjacError, LabelLogit

EXACT = {"rtol": 1e-12, "atol": 1e-14}
POWERS = pytest.mark.parametrize("power", [1, 2, 2.5, 3, 4])


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def naive_pooled(z: Tensor, k: int, power: float) -> list[list[list[float]]]:
    """P of the definition, one number at a time."""
    batch, channels, h, w = z.shape
    attention = [
        [
            [sum(abs(v) ** power for v in z[b, :, i, j].tolist()) / channels for j in range(w)]
            for i in range(h)
        ]
        for b in range(batch)
    ]
    return [
        [
            [
                sum(attention[b][i + di][j + dj] for di in range(k) for dj in range(k)) / k**2
                for j in range(w - k + 1)
            ]
            for i in range(h - k + 1)
        ]
        for b in range(batch)
    ]


@POWERS
@pytest.mark.parametrize("window", [1 / 10, 1 / 5, 1 / 3, 1])
def test_the_attention_windows_definition(window, power):
    z, target = features(2, 3, 6, 8), AttentionWindow("z", window, power)
    k = max(1, math.floor(6 * window))
    pooled = naive_pooled(z, k, power)
    assert target.side(z) == k
    torch.testing.assert_close(target.pooled(z), torch.tensor(pooled, dtype=z.dtype), **EXACT)
    for b in range(2):
        places = [(i, j) for i in range(6 - k + 1) for j in range(8 - k + 1)]
        brightest = max(places, key=lambda p: pooled[b][p[0]][p[1]])
        assert tuple(target.position(z)[b].tolist()) == brightest
        for i, j in (brightest, places[0], places[-1], (0, 8 - k), (6 - k, 0)):
            phi = target.scalar(z, torch.tensor([[i, j]] * 2))[b]
            assert phi.item() == pytest.approx(pooled[b][i][j], rel=1e-12)
        assert target.position(z).dtype == torch.int64


def test_the_side_is_a_share_of_the_height():
    for h in range(1, 60):
        for parts in (2, 3, 5, 7):
            side = AttentionWindow("z", window=1 / parts).side(torch.empty(1, 1, h, 60))
            assert side == max(1, h // parts)
    assert 0.29 * 100 < 29  # a rounding that must not cost a pixel
    assert AttentionWindow("z", window=0.29).side(torch.empty(1, 1, 100, 100)) == 29
    assert AttentionWindow("z", window=0.29).side(torch.empty(1, 1, 10, 10)) == 2


def test_of_equal_windows_the_first_stands():
    position = AttentionWindow("z").position(torch.ones(2, 3, 10, 7))
    assert position.tolist() == [[0, 0], [0, 0]]


def test_the_position_is_no_function_to_differentiate():
    z = features(1, 2, 5, 5).requires_grad_()
    assert not AttentionWindow("z").position(z).requires_grad


@POWERS
def test_the_scalars_derivatives(power):
    target, z = AttentionWindow("z", 1 / 2, power), features(2, 2, 4, 4).requires_grad_()
    position = torch.tensor([[0, 1], [2, 2]])
    assert torch.autograd.gradcheck(lambda z: target.scalar(z, position), z)
    assert torch.autograd.gradgradcheck(lambda z: target.scalar(z, position), z)


@POWERS
def test_dead_features_have_finite_derivatives(power):
    target, z = AttentionWindow("z", 1 / 2, power), torch.zeros(1, 2, 4, 4).double()
    phi = target.scalar(z.requires_grad_(), torch.tensor([[0, 1]]))
    (slope,) = torch.autograd.grad(phi.sum(), z, create_graph=True)
    assert phi == slope.count_nonzero() == 0
    if power >= 2:
        (bend,) = torch.autograd.grad(slope.sum(), z)
        assert bend.isfinite().all()
        assert bend.count_nonzero() == (8 if power == 2 else 0)


# From one map to another


def transfer(
    position: list[int], source: tuple[int, int], destination: tuple[int, int], window=1 / 5
):
    target = AttentionWindow("z", window)
    maps = (torch.empty(1, 2, *size) for size in (source, destination))
    return target.transfer(torch.tensor([position]), *maps)[0].tolist()


def test_maps_of_one_size_share_the_position():
    position = torch.tensor([[3, 4]])
    same = torch.empty(1, 2, 10, 10)
    assert AttentionWindow("z").transfer(position, same, torch.empty(1, 7, 10, 10)) is position


@pytest.mark.parametrize("window", [1 / 10, 1 / 5, 1 / 2, 1])
@pytest.mark.parametrize(
    ("source", "destination"),
    [((10, 10), (20, 20)), ((20, 20), (10, 10)), ((12, 17), (23, 31)), ((31, 40), (9, 11))],
    ids=str,
)
def test_the_centre_keeps_its_relative_coordinates(source, destination, window):
    k_from, k_to = (max(1, math.floor(size[0] * window + 1e-9)) for size in (source, destination))
    for r in range(source[0] - k_from + 1):
        for c in range(source[1] - k_from + 1):
            got = transfer([r, c], source, destination, window)
            for start, at, n, m in zip(got, (r, c), source, destination, strict=True):
                wanted = (at + k_from / 2) / n * m - k_to / 2
                assert 0 <= start <= m - k_to
                assert start == min(max(math.floor(wanted + 1e-9), 0), m - k_to)


def test_corners_go_to_corners():
    for destination in ((20, 30), (7, 5), (56, 56)):
        k = max(1, destination[0] // 5)
        last = [destination[0] - k, destination[1] - k]
        assert transfer([0, 0], (28, 28), destination) == [0, 0]
        near = transfer([23, 23], (28, 28), destination)
        assert all(n - 1 <= got <= n for got, n in zip(near, last, strict=True))


def test_there_and_back_on_a_map_of_twice_the_size():
    for r in range(9):
        there = transfer([r, r], (10, 10), (20, 20))
        assert transfer(there, (20, 20), (10, 10)) == [r, r]


# The label's logit, and what both have


def test_the_label_logits_definition():
    logits, y = features(5, 7), torch.tensor([6, 0, 3, 3, 1])
    phi = LabelLogit().scalar(logits, y)
    assert phi.tolist() == [logits[i, y[i]].item() for i in range(5)]


def test_defaults_of_the_paper():
    assert AttentionWindow("z").normalize is True
    assert LabelLogit().normalize is False
    assert (AttentionWindow("z").window, AttentionWindow("z").power) == (1 / 5, 2)
    assert AttentionWindow("z").anchor == "teacher"
    assert LabelLogit().layer is None


def test_the_teachers_target():
    target = AttentionWindow("a", 1 / 3, 3, "own", teacher_layer="b")
    assert target.for_teacher() == AttentionWindow("b", 1 / 3, 3)
    assert AttentionWindow("a").for_teacher() == AttentionWindow("a")
    assert LabelLogit().for_teacher() == LabelLogit()


def test_errors():
    with pytest.raises(FastjacError, match=r"layer 'z' is not a feature map: .*got \[2, 3\]"):
        AttentionWindow("z").pooled(torch.empty(2, 3))
    with pytest.raises(
        FastjacError, match=r"a 2x2 window \(0.2 of the height\) is larger .* 10x1 map"
    ):
        AttentionWindow("z").pooled(torch.empty(1, 2, 10, 1))
    with pytest.raises(FastjacError, match="LabelLogit needs the labels y"):
        LabelLogit().scalar(torch.empty(2, 3), None)
