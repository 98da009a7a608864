"""Proposition 3 and its corollary: directed Hausdorff distances, and the bound that they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastjac.errors import FastjacError, check_int, is_int, unknown

METRICS = ("euclidean", "manhattan", "angular")
Metric = Literal["euclidean", "manhattan", "angular"]


@dataclass(frozen=True)
class Hausdorff:
    """A directed Hausdorff distance, and the pair of points where it is attained.

    Attributes:
        distance: the distance.
        point: the point of the large set that is farthest from the small set, by index.
        nearest: the point of the small set that is nearest to it.
    """

    distance: float
    point: int
    nearest: int


def hausdorff(
    large: Tensor, small: Tensor, metric: Metric = "euclidean", *, block_bytes: int = 2**28
) -> Hausdorff:
    """The directed Hausdorff distance ``H(large, small) = max over a of min over b of metric(a, b)``.

    How far the points of ``large`` may lie from ``small``; not symmetric. From a superset of ``small``
    it is never larger (the corollary of Proposition 3).

    Args:
        large: ``[N, ...]``; small: ``[M, ...]``: points (images, features), each read as one vector. One
            dtype and device; computed in float32 or wider.
        metric: ``"euclidean"``, ``"manhattan"``, or ``"angular"``: the angle in radians.
        block_bytes: memory for the distances that exist at a time.

    Distances are taken in blocks; as in SciPy's ``directed_hausdorff``, a point is dropped once it is
    known to be nearer than the farthest so far, and the points that lie far out come first. In blocks
    the Euclidean squares are ``||a||^2 - 2<a, b> + ||b||^2`` around the small set's mean; the distance
    that is returned is taken again from differences, so that it is 0 for a point that both sets have.
    Which point is farthest is right to the rounding of those squares, about 1e-6 of the squared distance
    from the mean in float32: for sets that are closer to each other than 1e-3 of their extent, pass
    float64. Deterministic where the device's matrix products are.

    Raises :class:`fastjac.FastjacError` for sets that are empty, of different sizes of points, have a
    NaN or an infinity, or numbers whose squares overflow.

    >>> import torch
    >>> hausdorff(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [2.0]]))
    Hausdorff(distance=3.0, point=2, nearest=1)
    """
    a, b = _check_sets(large, small, metric)
    size = check_int("block_bytes", block_bytes, 1) // a.element_size()
    centre = b.mean(0)
    order = torch.cat([(r - centre).square().sum(1) for r in _row_blocks(a, size)])
    best, point = a.new_full((), -math.inf), 0
    for rows, values, _ in _nearest_blocks(
        a, b, metric, size, order.argsort(descending=True), best
    ):
        if (most := values.max()) > best:
            best.copy_(most)
            point = int(rows[values.argmax()])
    distances = _direct(b, a[point], metric, size)
    nearest = int(distances.argmin())
    return Hausdorff(distances[nearest].item(), point, nearest)


def nearest_distances(
    large: Tensor, small: Tensor, metric: Metric = "euclidean", *, block_bytes: int = 2**28
) -> tuple[Tensor, Tensor]:
    """The distance of each point of ``large`` to ``small``, and the nearest point's index; both ``[N]``.

    Arguments and errors as in :func:`hausdorff`, whose distance is the largest of these.

    >>> import torch
    >>> nearest_distances(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [2.0]]))
    (tensor([0., 1., 3.]), tensor([0, 0, 1]))
    """
    a, b = _check_sets(large, small, metric)
    size = check_int("block_bytes", block_bytes, 1) // a.element_size()
    index = torch.cat([found for _, _, found in _nearest_blocks(a, b, metric, size)])
    blocks = zip(_row_blocks(a, size), _row_blocks(index[:, None], size, a.shape[1]), strict=True)
    apart = [_pairwise(rows, b[found[:, 0]], metric) for rows, found in blocks]
    return torch.cat(apart), index


@dataclass(frozen=True)
class TransferBound:
    """Both sides of Proposition 3, and what the right one is made of.

    Attributes:
        mean_large: the mean loss over the large set (the left side).
        bound: ``max_small + lipschitz * hausdorff`` (the right side).
        max_small: the largest loss over the small set.
        lipschitz: K, as given or estimated.
        hausdorff: the directed distance of the large set from the small one.
    """

    mean_large: float
    bound: float
    max_small: float
    lipschitz: float
    hausdorff: float


def transfer_bound(
    large: Tensor,
    small: Tensor,
    large_losses: Tensor,
    small_losses: Tensor,
    metric: Metric = "euclidean",
    lipschitz: float | None = None,
    *,
    pairs: int = 100_000,
    generator: torch.Generator | None = None,
    block_bytes: int = 2**28,
) -> TransferBound:
    """Proposition 3: a small mean loss on a large set from a small loss on one that covers it.

    ``mean over large of l <= max over small of l + K H(large, small)``, for a loss ``l = l(f(x), g(x))``
    that is K-Lipschitz in the metric, f and g student and teacher.

    Args:
        large: ``[N, ...]``; small: ``[M, ...]``: the points, as :func:`hausdorff` takes them. The losses
            must be a function of them: images, or features that both networks' outputs are computed
            from.
        large_losses: the loss at each, ``[N]``; small_losses: ``[M]``.
        lipschitz: K, if it is known. None: the largest slope between a point of the large set and its
            nearest of the small one, and over random pairs (:func:`lipschitz_estimate`). **Such an
            estimate is a lower bound on K.** With it the inequality holds for these points, by
            construction, and promises nothing about others.
        pairs, generator: of the random pairs.

    Raises :class:`fastjac.FastjacError` for bad input, and for points that coincide while their losses
    differ, since there is no K.

    >>> import torch
    >>> large, small = torch.rand(100, 3), torch.rand(10, 3)
    >>> found = transfer_bound(large, small, large.sum(1), small.sum(1), lipschitz=3**0.5)
    >>> found.mean_large <= found.bound
    True
    """
    a, b = _check_sets(large, small, metric)
    la, lb = _check_losses("large", large_losses, a), _check_losses("small", small_losses, b)
    if lipschitz is None:
        distances, index = nearest_distances(large, small, metric, block_bytes=block_bytes)
        distance = distances.max().item()
        lipschitz = _steepest(la - lb[index], distances)
        points, losses = torch.cat([a, b]), torch.cat([la, lb])
        if len(points) > 1:
            others = lipschitz_estimate(points, losses, metric, pairs=pairs, generator=generator)
            lipschitz = max(lipschitz, others)
    elif not 0 < (lipschitz := float(lipschitz)) < math.inf:
        raise FastjacError(f"transfer_bound: lipschitz must be a number above 0, got {lipschitz}")
    else:
        distance = hausdorff(large, small, metric, block_bytes=block_bytes).distance
    most = lb.max().item()
    return TransferBound(la.mean().item(), most + lipschitz * distance, most, lipschitz, distance)


def lipschitz_estimate(
    points: Tensor,
    losses: Tensor,
    metric: Metric = "euclidean",
    *,
    pairs: int = 100_000,
    generator: torch.Generator | None = None,
) -> float:
    """The largest ``|l(a) - l(b)| / metric(a, b)`` over random pairs: a lower bound on K.

    ``points``: ``[N, ...]``, N at least 2; ``losses``: ``[N]``; ``generator``: of their device. Raises
    as :func:`transfer_bound` does.

    >>> import torch
    >>> points = torch.rand(50, 1)
    >>> round(lipschitz_estimate(points, 2 * points[:, 0]), 3)
    2.0
    """
    a, _ = _check_sets(points, points, metric)
    values = _check_losses("given", losses, a)
    if len(a) < 2 or check_int("pairs", pairs, 0) < 1:
        raise FastjacError(
            f"lipschitz_estimate: expected 2 points and 1 pair or more, got {len(a)}, {pairs}"
        )
    steepest = 0.0
    for n in _chunks(pairs, max(1, 2**24 // a.shape[1])):
        i = torch.randint(len(a), (n,), device=a.device, generator=generator)
        j = (i + torch.randint(1, len(a), (n,), device=a.device, generator=generator)) % len(a)
        steepest = max(steepest, _steepest(values[i] - values[j], _pairwise(a[i], a[j], metric)))
    return steepest


@dataclass(frozen=True)
class FarthestFirst:
    """Points that cover a set, in the order in which they were picked.

    Attributes:
        picks: indices into the large set, ``[k]`` int64.
        distances: H after 0 to k picks, ``[k + 1]``; infinite where nothing covers.
    """

    picks: Tensor
    distances: Tensor


def farthest_first(
    large: Tensor,
    small: Tensor | None = None,
    k: int = 1,
    metric: Metric = "euclidean",
    *,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    block_bytes: int = 2**28,
) -> FarthestFirst:
    """k points of ``large`` that, added to ``small``, bring ``H(large, small)`` down.

    Each is the one that is farthest from all before it (Gonzalez, 1985): without a small set, H is at
    most twice the smallest that any k points reach. The first of them is then the nearest to the mean
    (of unit vectors, for angles). Ties go to the lowest index.

    Args:
        large: ``[N, ...]``; small: ``[M, ...]`` or None. Both as in :func:`hausdorff`.
        k: from 1 to N.
        progress: wraps the range of picks, as tqdm does.

    A pick takes one pass over ``large``. Deterministic. Raises :class:`fastjac.FastjacError` for bad
    input.

    >>> import torch
    >>> farthest_first(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0]]), 2)
    FarthestFirst(picks=tensor([2, 1]), distances=tensor([5., 1., 0.]))
    """
    a, _ = _check_sets(large, large if small is None else small, metric)
    if not is_int(k) or not 1 <= k <= len(a):
        raise FastjacError(
            f"farthest_first: k must be from 1 to the set's {len(a)} points, got {k!r}"
        )
    size = check_int("block_bytes", block_bytes, 1) // a.element_size()
    if small is None:
        left = a.new_full((len(a),), math.inf)
        first = int(_direct(a, a.mean(0), "euclidean", size).argmin())
    else:
        left, _ = nearest_distances(large, small, metric, block_bytes=block_bytes)
        first = int(left.argmax())
    picks, distances = [], [left.max()]
    for step in progress(range(k)):
        picks.append(first if step == 0 else int(left.argmax()))
        left = torch.minimum(left, _direct(a, a[picks[-1]], metric, size))
        distances.append(left.max())
        left[picks[-1]] = -1.0  # below every distance: not picked again
    last = torch.stack(distances).clamp_min(0)
    return FarthestFirst(torch.tensor(picks, device=a.device), last)


def _chunks(total: int, most: int) -> Iterator[int]:
    """``total`` in parts of at most ``most``."""
    for start in range(0, total, most):
        yield min(most, total - start)


def _check_sets(large: Tensor, small: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Both as finite rows in float32 or wider; for angles, of unit length."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    for name, points in (("large", large), ("small", small)):
        if not isinstance(points, Tensor) or points.dim() < 2 or not points.is_floating_point():
            came = (
                f"{points.dtype} {list(points.shape)}"
                if isinstance(points, Tensor)
                else type(points).__name__
            )
            raise FastjacError(f"the {name} set must be floating-point points [N, ...]; got {came}")
        if not points.numel():
            raise FastjacError(f"the {name} set is empty: {list(points.shape)}; expected points")
    if large.shape[1:] != small.shape[1:]:
        raise FastjacError(
            f"points of both sets must have one size; got {list(large.shape[1:])} (large) and "
            f"{list(small.shape[1:])} (small)"
        )
    if (large.dtype, large.device) != (small.dtype, small.device):
        raise FastjacError(
            f"both sets must have one dtype and device; got {large.dtype} on {large.device} (large) and "
            f"{small.dtype} on {small.device} (small)"
        )
    rows = _rows("large", large, metric)
    return rows, rows if small is large else _rows("small", small, metric)


def _rows(name: str, points: Tensor, metric: str) -> Tensor:
    rows = points.detach().flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = torch.stack(torch.aminmax(rows)).abs().max().item()
    if not largest < math.inf:
        point = int(rows.isfinite().all(1).logical_not().nonzero()[0])
        raise FastjacError(
            f"the {name} set has a NaN or an infinity in point {point}; expected finite ones"
        )
    most = math.sqrt(torch.finfo(rows.dtype).max / rows.shape[1]) / 4
    if largest > most:
        raise FastjacError(
            f"the {name} set has numbers up to {largest:.3g}, whose squares overflow; expected at most "
            f"{most:.3g}: rescale both sets"
        )
    if metric == "angular":
        # By their largest numbers first, so that no square underflows.
        scale = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True)
        if not (scale > 0).all():
            point = int((scale[:, 0] == 0).nonzero()[0])
            raise FastjacError(
                f"the {name} set's point {point} is 0, which has no angle to another"
            )
        rows = torch.nn.functional.normalize(rows / scale)
    return rows


def _check_losses(name: str, losses: Tensor, points: Tensor) -> Tensor:
    if not isinstance(losses, Tensor) or losses.is_complex():
        came = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise FastjacError(f"the {name} losses must be a tensor of real numbers, got {came}")
    if losses.shape != points.shape[:1] or losses.device != points.device:
        raise FastjacError(
            f"the {name} losses must be one for each of {len(points)} points, on {points.device}; got "
            f"{list(losses.shape)} on {losses.device}"
        )
    if not losses.isfinite().all():
        point = int(losses.isfinite().logical_not().nonzero()[0])
        raise FastjacError(f"the {name} losses have a NaN or an infinity, that of point {point}")
    return losses.detach().to(points.dtype)


def _row_blocks(a: Tensor, size: int, columns: int | None = None) -> tuple[Tensor, ...]:
    return a.split(max(1, size // (columns or a.shape[1])))


def _nearest_blocks(
    a: Tensor,
    b: Tensor,
    metric: str,
    size: int,
    order: Tensor | None = None,
    best: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of a, a monotone function of each one's distance to b, and the nearest row of b.

    At most ``size`` distances exist at a time. With ``best``, a number that the caller raises, rows are
    left out once that function is not above it; the first blocks of both sets are small, so that it
    rises early and most rows go early.
    """
    pruned, euclidean = best is not None, metric != "manhattan"
    most = min(len(b), 2048 if pruned else max(1, size // 256))
    largest = max(1, size // max(most, a.shape[1]))
    start, step = 0, min(256, largest) if pruned else largest
    centre = b.mean(0)
    b = b - centre
    squares = b.square().sum(1)
    while start < len(a):
        rows = slice(start, start + step)
        where = torch.arange(len(a), device=a.device)[rows] if order is None else order[rows]
        block = a[where] - centre
        own = block.square().sum(1)
        value = torch.full_like(own, math.inf)
        index = torch.zeros_like(where)
        first, width = 0, 64 if pruned else most
        while first < len(b):
            these = slice(first, first + width)
            if euclidean:
                found = torch.addmm(squares[these], block, b[these].T, alpha=-2).min(1)
            else:
                found = torch.cdist(block, b[these], p=1).min(1)
            distance = found.values + own if euclidean else found.values
            nearer = distance < value
            value = torch.where(nearer, distance, value)
            index = torch.where(nearer, found.indices + first, index)
            if pruned and not (far := value > best).all():
                where, block, own, value = where[far], block[far], own[far], value[far]
                index = index[far]
                if not len(where):
                    break
            first, width = first + width, min(2 * width, most)
        else:
            yield where, value, index
        start += step
        step = min(2 * step, largest)


def _pairwise(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """The distance of each row of a to the same row of b."""
    order = 1 if metric == "manhattan" else 2
    return _as_metric(torch.linalg.vector_norm(a - b, order, dim=1), metric)


def _direct(a: Tensor, point: Tensor, metric: str, size: int) -> Tensor:
    """The distance of each row of a to one point, from differences."""
    order, mode = 1 if metric == "manhattan" else 2, "donot_use_mm_for_euclid_dist"
    blocks = _row_blocks(a, size)
    return _as_metric(
        torch.cat([torch.cdist(r, point[None], order, mode)[:, 0] for r in blocks]), metric
    )


def _as_metric(distance: Tensor, metric: str) -> Tensor:
    """Of unit vectors, the angle by the length of their difference."""
    return 2 * (distance / 2).clamp_max(1).asin() if metric == "angular" else distance


def _steepest(differences: Tensor, distances: Tensor) -> float:
    """The largest slope; raises where the losses of coinciding points differ."""
    same = distances == 0
    if (same & (differences != 0)).any():
        gap = differences[same].abs().max().item()
        raise FastjacError(
            f"points coincide whose losses differ by {gap:.3g}, so there is no Lipschitz constant; "
            "expected losses that are a function of the points"
        )
    return (differences.abs() / distances.masked_fill(same, 1)).max().item()
