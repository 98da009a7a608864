"""Receptive-field arithmetic against brute force: move one input pixel, see which outputs move."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastjac import AttentionWindow, input_jacobian
from fastjac.engine import InputJacobian
from fastjac.engine.receptive_field import Interval, KernelGeometry, Region
from fastjac.jacobian import Forward

KERNELS = [(k, p) for k in (1, 2, 3, 5) for p in (0, 1, 2) if p < k]
GEOMETRIES = [
    KernelGeometry(k, s, p, d) for (k, p), s, d in itertools.product(KERNELS, (1, 2, 3), (1, 2))
]
LENGTH = 49


def moved(length: int, *windows: KernelGeometry) -> torch.Tensor:
    """Whether output j moves with input i, ``[length, outputs]``: all weights are positive."""
    y = torch.eye(length, dtype=torch.float64)[:, None]
    for w in windows:
        y = F.conv1d(y, y.new_ones(1, 1, w.kernel), None, w.stride, w.padding, w.dilation)
    return y[:, 0] > 0


def seen(reach: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each window of n outputs: whether any input moves it, the first that does, and the last."""
    any_of = F.max_pool1d(reach.double(), n, 1)
    last = len(reach) - 1 - any_of.flip(0).argmax(0)
    return any_of.amax(0) > 0, any_of.argmax(0), last


def at(interval: Interval, r: int) -> tuple[int, int]:
    start = interval.scale * r + interval.offset
    return start, start + interval.size


def check_seen(reach: torch.Tensor, interval: Interval, n: int, inner: list) -> int:
    """Every window's inputs lie in ``interval``, and reach both its ends if nothing leaves its map.

    ``inner``: (interval, length) of each map on the way. How many windows had such ends.
    """
    some, first, last = seen(reach, n)
    start, end = at(interval, torch.arange(len(some)))
    assert ((start <= first) & (last < end))[some].all()
    inside = torch.ones_like(some)
    for part, length in inner:
        low, high = at(part, torch.arange(len(some)))
        inside &= (low >= 0) & (high <= length)
    assert some[inside].all()
    assert ((first == start) & (last == end - 1))[inside].all()
    return int(inside.sum())


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("window", GEOMETRIES, ids=str)
def test_one_layer(window, n):
    reach, interval = moved(LENGTH, window), Interval(1, 0, n).through(window)
    assert check_seen(reach, interval, n, [(interval, LENGTH)]) > 0


@pytest.mark.parametrize("first", GEOMETRIES, ids=str)
def test_two_layers(first):
    n, tight = 2, 0
    for second in GEOMETRIES:
        reach = moved(LENGTH, first, second)
        middle = Interval(1, 0, n).through(second)
        inner = [(middle, moved(LENGTH, first).shape[1]), (middle.through(first), LENGTH)]
        tight += check_seen(reach, inner[1][0], n, inner)
    assert tight > len(GEOMETRIES)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_branches_that_meet(stride):
    windows, n, tight = [w for w in GEOMETRIES if w.stride == stride], 2, 0
    for a, b in itertools.combinations(windows, 2):
        reaches = [moved(LENGTH, w) for w in (a, b)]
        outputs = min(r.shape[1] for r in reaches)
        reach = reaches[0][:, :outputs] | reaches[1][:, :outputs]
        intervals = [Interval(1, 0, n).through(w) for w in (a, b)]
        hull = intervals[0].hull(intervals[1])
        assert hull == intervals[1].hull(intervals[0])
        tight += check_seen(reach, hull, n, [(hull, LENGTH)])
    assert tight > len(windows)


@pytest.mark.parametrize("window", GEOMETRIES, ids=str)
def test_exceeds(window):
    # The padding as pixels of the map: an output that moves with one of them exceeds it.
    reach = moved(
        LENGTH + 2 * window.padding,
        KernelGeometry(window.kernel, window.stride, 0, window.dilation),
    )
    interval, answers = Interval(1, 0, 2).through(window), set()
    for positions in range(1, reach.shape[1]):
        first, last = (s[:positions] - window.padding for s in seen(reach, 2)[1:])
        outside = bool((first < 0).any() or (last >= LENGTH).any())
        answers.add(outside)
        assert interval.exceeds(LENGTH, positions) == outside
    assert (True in answers) == (window.padding > 0)


def test_a_region_exceeds_a_map_by_either_axis():
    interval, longer = Interval(1, 0, 3), Interval(1, 0, 4)
    assert not Region(interval, longer).exceeds((5, 6), (3, 3))
    assert Region(longer, longer).exceeds((5, 6), (3, 3))
    assert Region(interval, longer).exceeds((5, 6), (3, 4))
    assert Region(interval, longer).exceeds((5, 5), (3, 3))


def test_branches_at_different_scales_do_not_meet():
    halved, same = (Interval(1, 0, 2).through(KernelGeometry(3, s)) for s in (2, 1))
    with pytest.raises(ValueError, match="intervals move at different scales: 2 and 1"):
        halved.hull(same)
    with pytest.raises(ValueError, match="different scales: 1 and 2"):
        Region(same, same).hull(Region(same, halved))


def test_a_map_in_two_layouts_has_no_hull():
    region = Region.window(2)
    with pytest.raises(ValueError, match=r"read as \[B, C, H, W\] and as \[B, H, W, C\]"):
        region.hull(region.moved(1))
    assert region.moved(1).hull(region.moved(1)) == region.moved(1)


def test_a_region_is_an_interval_on_each_axis():
    tall, wide = KernelGeometry(5, 3, 2), KernelGeometry(2, 1, 1, 2)
    region = Region.window(4).through((tall, wide))
    assert region.rows == Interval(1, 0, 4).through(tall)
    assert region.cols == Interval(1, 0, 4).through(wide)
    assert (region.shape, region.area, region.scales) == ((14, 6), 84, (3, 1))
    assert Region.window(4) != region


@pytest.mark.parametrize("first", GEOMETRIES[::5], ids=str)
@pytest.mark.parametrize("second", GEOMETRIES[::7], ids=str)
def test_within_is_where_the_pixels_are(first, second):
    inner = Region.window(2).through((first, first))
    other = Region.window(3).through((first, first)).through((second, KernelGeometry(3)))
    other = Region(Interval(first.stride, other.rows.offset, other.rows.size), other.cols)
    outer = inner.hull(other)
    for r in (0, 3):
        rows, cols = at(outer.rows, r), at(outer.cols, r)
        pixels = torch.arange(*rows)[:, None] * 1000 + torch.arange(*cols)
        top, left = inner.within(outer)
        part = pixels[top : top + inner.shape[0], left : left + inner.shape[1]]
        assert part.shape == inner.shape
        assert part[0, 0] == at(inner.rows, r)[0] * 1000 + at(inner.cols, r)[0]


def conv(rows: KernelGeometry, cols: KernelGeometry, channels: int) -> nn.Conv2d:
    geometry = ([getattr(w, name) for w in (rows, cols)] for name in ("kernel", "stride"))
    pad = [w.padding for w in (rows, cols)]
    dilation = [w.dilation for w in (rows, cols)]
    return nn.Conv2d(channels, 2, *geometry, padding=pad, dilation=dilation, dtype=torch.float64)


class Net(nn.Module):
    """``layer``, then something global."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean((2, 3))


def pairs(count: int) -> list:
    make = torch.Generator().manual_seed(0)
    picks = torch.randint(len(GEOMETRIES), (count, 4), generator=make).tolist()
    return [tuple(GEOMETRIES[i] for i in pick) for pick in picks]


def cropped(
    net: nn.Module, x: torch.Tensor, target: AttentionWindow, position: torch.Tensor
) -> InputJacobian:
    """J as the crop that holds its support."""
    with torch.no_grad():
        run = Forward(net, x, (target,), None, (), None, "frozen")
        return run.jacobian(target.at(position), 0, None, "local", whole=False)


def positions_of(net: Net, x: torch.Tensor, target: AttentionWindow) -> list[tuple[int, int]]:
    z = net.layer(x)
    k = target.side(z)
    rows, cols = (range(n - k + 1) for n in z.shape[2:])
    return list(itertools.product(*({r[0], r[len(r) // 2], r[-1]} for r in (rows, cols))))


@pytest.mark.parametrize("windows", pairs(40), ids=lambda w: "-".join(map(str, w)))
def test_the_engines_crop_is_the_support_of_j(windows):
    rows1, cols1, rows2, cols2 = windows
    net = Net(conv(rows1, cols1, 1), conv(rows2, cols2, 2))
    for weight in net.parameters():
        weight.data.uniform_(0.5, 1)
    x = torch.rand(1, 1, 49, 97, dtype=torch.float64)
    target = AttentionWindow("layer", window=1 / 6)
    k, tight = target.side(net.layer(x)), 0
    middle = Region.window(k).through((rows2, cols2))
    expected = middle.through((rows1, cols1))
    for place in positions_of(net, x, target):
        position = torch.tensor([place])
        result = cropped(net, x, target, position)
        assert result.row.region == expected
        assert result.values.shape[2:] == expected.shape
        j = input_jacobian(net, x, target, position=position, strategy="autograd")
        torch.testing.assert_close(result.whole(), j, rtol=1e-12, atol=1e-13)
        for axis, interval in enumerate((expected.rows, expected.cols)):
            start, end = at(interval, place[axis])
            seen = (j != 0).any(3 - axis).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
            assert all(start <= i < end for i in seen)
            inner = (middle.rows, middle.cols)[axis]
            first, last = at(inner, place[axis])
            inside = start >= 0 and end <= x.shape[2 + axis] and first >= 0
            if inside and last <= net.layer[0](x).shape[2 + axis]:
                assert (seen[0], seen[-1] + 1) == (start, end)
                tight += 1
    assert tight > 0


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(3, 3, (5, 3), 2, (2, 1), bias=False)
        self.main = nn.Sequential(
            first, nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)
        )
        self.skip = nn.Conv2d(3, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.skip(x)


def test_the_engines_crop_of_a_residual_network_is_the_hull():
    net = Net(nn.Conv2d(1, 3, 3, 1, 1), nn.MaxPool2d(3, 2, 1), Residual()).double()
    x = torch.randn(2, 1, 49, 65, dtype=torch.float64)
    target = AttentionWindow("layer", window=1 / 5)
    skip = Region.window(2).through((KernelGeometry(1, 2), KernelGeometry(1, 2)))
    main = Region.window(2).through((KernelGeometry(3, 1, 1),) * 2)
    main = main.through((KernelGeometry(5, 2, 2), KernelGeometry(3, 2, 1)))
    stem = (
        skip.hull(main)
        .through((KernelGeometry(3, 2, 1),) * 2)
        .through((KernelGeometry(3, 1, 1),) * 2)
    )
    for place in positions_of(net, x, target):
        position = torch.tensor([place, (1, 2)])
        result = cropped(net, x, target, position)
        assert result.row.region == stem
        j = input_jacobian(net, x, target, position=position, strategy="autograd")
        torch.testing.assert_close(result.whole(), j, rtol=1e-12, atol=1e-13)
