"""Propositions 1 to 3: each side against sampling, closed forms, SciPy and exhaustive search."""

import doctest
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist, directed_hausdorff
from torch import Tensor, nn

from fastjac import (
    AttentionWindow,
    FastjacError,
    LabelLogit,
    Logits,
    cross_entropy_jacobian_loss,
    input_jacobian,
    jacobian_match_loss,
)
from fastjac.theory import (
    METRICS,
    covering,
    farthest_first,
    hausdorff,
    lipschitz_estimate,
    nearest_distances,
    noise,
    noise_expansion,
    normalized_noise_expansion,
    transfer_bound,
)

SIGMAS = [0.1, 0.05, 0.025, 0.0125]
SCIPY = {"euclidean": "euclidean", "manhattan": "cityblock"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(act: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), act, nn.Linear(width, 3)).double().eval()


def smooth() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(2)  # fourth derivatives that a few thousand pairs show
    networks = network(nn.Tanh(), 6), network(nn.Tanh(), 8)
    with torch.no_grad():
        for model in networks:
            model[0].weight *= 2
    return *networks, torch.randn(3, 4).double()


def linear() -> tuple[nn.Module, nn.Module, Tensor]:
    return *(nn.Linear(4, 3).double().eval() for _ in range(2)), torch.randn(3, 4).double()


def value(s: Tensor, t: Tensor, loss: str) -> Tensor:
    if loss == "squared_error":
        return (s - t).square().sum(1)
    return -(t.softmax(1) * s.log_softmax(1)).sum(1)


class Ramp(nn.Module):
    """relu(w x) + 1 of one number."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).relu() + 1


class Flat(nn.Module):
    """0 for every number."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


@pytest.mark.parametrize("loss", noise.LOSSES)
def test_smooth_networks_show_order_4_with_the_laplacian_and_2_without(loss):
    student, teacher, x = smooth()
    with_it = noise_expansion(student, teacher, x, SIGMAS, loss, curvature=True, pairs=4000)
    without = noise_expansion(student, teacher, x, SIGMAS, loss, pairs=300)
    assert with_it.slope == pytest.approx(4, abs=0.2)
    assert without.slope == pytest.approx(2, abs=0.1)
    assert (with_it.residual.abs() > 2 * with_it.standard_error).all()


@pytest.mark.parametrize("loss", noise.LOSSES)
def test_both_sides(loss):
    """The left by sampling without any variance reduction, the right by derivatives in x."""
    student, teacher, x = smooth()
    found = noise_expansion(student, teacher, x, [0.3], loss, curvature=True, pairs=2000)
    at = x + 0.3 * torch.randn(40_000, *x.shape).double()
    with torch.no_grad():
        plain = value(student(at.flatten(0, 1)), teacher(at.flatten(0, 1)), loss)
    plain = plain.view(-1, 3).mean(1)
    error = math.hypot(plain.std().item() / 200, found.standard_error.item())
    assert found.noisy.item() == pytest.approx(plain.mean().item(), abs=4 * error)

    def of_one(one: Tensor) -> Tensor:
        return value(student(one[None]), teacher(one[None]), loss)[0]

    laplacian = sum(torch.func.hessian(of_one)(one).trace() for one in x) / 3
    expected = value(student(x), teacher(x), loss).mean() + 0.3**2 / 2 * laplacian
    assert found.expansion.item() == pytest.approx(expected.item(), abs=0.01)
    assert found.residual.item() == pytest.approx((found.noisy - found.expansion).item())


def test_without_the_laplacian_where_the_outputs_agree():
    """Proposition 1 is of order 4 as it stands for D = 0, since the dropped term is D Laplacian D."""
    student, teacher, x = smooth()
    x = x[:1]
    with torch.no_grad():
        teacher[2].bias += (student(x) - teacher(x))[0]
    found = noise_expansion(student, teacher, x, SIGMAS, pairs=4000)
    exact = noise_expansion(student, teacher, x, SIGMAS, curvature=True, pairs=4000)
    torch.testing.assert_close(found.expansion, exact.expansion, rtol=1e-12, atol=1e-14)
    assert found.slope == pytest.approx(4, abs=0.2)


def test_linear_networks_leave_no_residual():
    student, teacher, x = linear()
    found = noise_expansion(student, teacher, x, SIGMAS, pairs=10)
    assert (found.residual.abs() < 1e-12).all()
    assert (found.noisy > found.noisy.new_tensor(SIGMAS) ** 2).all()
    assert math.isnan(found.slope)


def test_piecewise_linear_networks_away_from_kinks():
    """The residual vanishes below every power of sigma, once no noise reaches a kink."""
    student, teacher = network(nn.ReLU(), 6), network(nn.ReLU(), 8)
    x = torch.randn(1, 4).double()
    found = noise_expansion(student, teacher, x, [1.0, 1e-3], pairs=300)
    assert found.residual[0].abs() > 1e-3
    assert found.residual[1].abs() < 1e-13


def test_at_a_kink_and_over_many_points():
    """relu(x) + 1 against 0: order 1 at the kink; averaged over x in [-1, 1], sigma^2 / 2."""
    ramp, flat = Ramp(1.0).eval(), Flat().eval()
    at_kink = noise_expansion(flat, ramp, torch.zeros(1, 1).double(), [1e-2, 1e-3], pairs=4000)
    expected = 2 * at_kink.sigmas / math.sqrt(2 * math.pi) + at_kink.sigmas**2 / 2
    assert ((at_kink.residual - expected).abs() < 4 * at_kink.standard_error).all()
    assert at_kink.slope == pytest.approx(1, abs=0.05)
    x = torch.linspace(-1, 1, 2001).double()[:, None]
    found = noise_expansion(flat, ramp, x, [0.1, 0.05], pairs=400, rows=10_000)
    assert found.slope == pytest.approx(2, abs=0.3)
    assert found.residual[1].item() == pytest.approx(0.05**2 / 2, rel=0.2)


def test_proposition_2_needs_the_terms_that_the_paper_drops():
    student, teacher, x = linear()
    found = {
        terms: noise_expansion(student, teacher, x, SIGMAS, "cross_entropy", terms=terms, pairs=300)
        for terms in ("all", "logarithm", "paper")
    }
    assert found["all"].slope == pytest.approx(4, abs=0.2)
    s, t = student(x), teacher(x)
    js, jt = (input_jacobian(m, x, Logits()) for m in (student, teacher))
    full = cross_entropy_jacobian_loss(s, t, js, jt)
    for terms in ("logarithm", "paper"):
        dropped = full - cross_entropy_jacobian_loss(s, t, js, jt, terms)
        assert dropped.abs() > 0.005
        assert found[terms].slope == pytest.approx(2, abs=0.1)
        ratio = found[terms].residual[-1] / SIGMAS[-1] ** 2
        assert ratio.item() == pytest.approx(dropped.item(), rel=0.02)


def test_one_generator_gives_one_result():
    student, teacher, x = smooth()
    found = [
        noise_expansion(
            *(student, teacher, x, [0.1]),
            pairs=10,
            generator=torch.Generator().manual_seed(seed),
            rows=rows,
        ).noisy
        for seed, rows in ((1, 1000), (1, 1000), (2, 4))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], found[2], rtol=1e-2, atol=0)


def test_normalised_responses_do_not_depend_on_the_slope():
    student, teacher, x = smooth()
    y = torch.tensor([0, 1, 2])
    with torch.no_grad():
        teacher[2].weight *= 1000
    found = normalized_noise_expansion(student, teacher, x, [0.02, 0.01, 0.005], y=y, pairs=400)
    for response in (found.student, found.teacher):
        assert torch.equal(response.expansion, response.sigmas**2)
        assert response.residual[-1].abs() < 0.1 * response.sigmas[-1] ** 2
        if response.residual[0].abs() > 4 * response.standard_error[0]:
            assert response.slope == pytest.approx(4, abs=0.5)
    assert found.student.slope == pytest.approx(4, abs=0.5)


def test_the_normalised_loss_is_distillation_under_that_noise():
    student, teacher, x = linear()
    y = torch.tensor([0, 1, 2])
    found = normalized_noise_expansion(student, teacher, x, SIGMAS, y=y, pairs=10)
    assert (found.loss.residual.abs() < 1e-12).all()
    js, jt = student.weight.detach()[y], teacher.weight.detach()[y]
    apart = (teacher(x) - student(x)).gather(1, y[:, None]).square().mean()
    loss = jacobian_match_loss(js, jt)
    torch.testing.assert_close(found.loss.expansion, apart + loss * found.loss.sigmas**2)
    # By sampling alone.
    z = torch.randn(20_000, 3, 4).double()
    noisy = [
        m(x + SIGMAS[0] * z / j.norm(dim=1)[:, None]).gather(2, y.expand(20_000, 3)[..., None])
        for m, j in ((student, js), (teacher, jt))
    ]
    plain = (noisy[0] - noisy[1])[..., 0].square().mean(1)
    error = plain.std().item() / math.sqrt(20_000)
    assert found.loss.noisy[0].item() == pytest.approx(plain.mean().item(), abs=4 * error)


def test_normalised_noise_of_a_window_and_of_several_scalars():
    def convolutions(width: int) -> nn.Module:
        layers = [nn.Conv2d(1, width, 3), nn.Tanh(), nn.Conv2d(width, 2, 3), nn.Flatten()]
        return nn.Sequential(*layers, nn.LazyLinear(3)).double().eval()

    student, teacher = convolutions(2), convolutions(3)
    x = torch.rand(2, 1, 10, 10).double()
    for model in (student, teacher):
        model(x)
    for target in (AttentionWindow("1"), Logits()):
        found = normalized_noise_expansion(student, teacher, x, [0.05, 0.02], target, pairs=100)
        for response in (found.student, found.teacher):
            assert response.noisy[1].item() == pytest.approx(0.02**2, rel=0.1)
        assert found.loss.noisy[1].item() == pytest.approx(found.loss.expansion[1].item(), rel=0.1)


def call(**change):
    student, teacher, x = linear()
    given = {"student": student, "teacher": teacher, "x": x, "sigmas": [0.1]} | change
    return noise_expansion(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": [0.1, 0.0]}, r"^sigmas: expected numbers above 0, .* got \[0.1, 0.0\]$"),
        ({"sigmas": [-1]}, "^sigmas: "),
        ({"sigmas": [math.nan]}, "^sigmas: "),
        ({"sigmas": []}, r"^sigmas: expected numbers above 0, at least one"),
        ({"sigmas": 0.1}, "^sigmas: expected a sequence of numbers, got 0.1$"),
        ({"sigmas": [0.1, 1e200]}, "^sigmas: expected numbers above 0"),
        ({"pairs": 1}, "^pairs: expected 2 or more, got 1$"),
        ({"pairs": 1e3}, "^pairs: expected an int, got 1000.0$"),
        ({"rows": 0}, "^rows: expected 1 or more, got 0$"),
        ({"terms": "papr"}, "^unknown terms 'papr'; nearest: 'paper'"),
        ({"student": len}, "^student: expected a torch.nn.Module, got builtin_function_or_method"),
        ({"loss": "squared"}, "^unknown loss 'squared'; nearest: 'squared_error'"),
        ({"loss": "cross_entropy", "terms": "none"}, "^unknown terms 'none'"),
        ({"student": nn.Linear(4, 3).double()}, "^the student is in train mode"),
        ({"teacher": nn.Linear(4, 2).double().eval()}, r"student \[3, 3\] and teacher \[3, 2\]$"),
        ({"teacher": nn.Flatten(0).eval()}, r"^the teacher must return logits \[B, K\]; got \[12\]$"),
        ({"x": torch.zeros(0, 4).double()}, "^x: expected at least one sample"),
        ({"x": torch.full((1, 4), math.nan).double()}, "^x: expected finite numbers"),
        ({"x": torch.zeros(1, 4)}, r"float32; the student is torch\.float64"),
    ],
)  # fmt: skip
def test_bad_input_of_the_expansions(change, message):
    with pytest.raises(FastjacError, match=message):
        call(**change)


def test_the_curvature_in_inference_mode():
    student, teacher, x = linear()
    student = nn.Sequential(student, nn.Tanh()).eval()

    def expansion():
        make = torch.Generator().manual_seed(0)
        options = {"curvature": True, "pairs": 4, "generator": make}
        return noise_expansion(student, teacher, x, [0.1], **options).expansion

    with torch.inference_mode():
        inside = expansion()
    assert torch.equal(inside, expansion())


def test_one_target_alone_is_expanded():
    student, teacher, x = linear()
    with pytest.raises(FastjacError, match=r"expected one target, got a tuple$"):
        normalized_noise_expansion(student, teacher, x, [0.1], (LabelLogit(),))


def test_networks_that_cannot_be_expanded():
    student, teacher, x = linear()
    with torch.no_grad():
        teacher.weight[1] = 0
        student.bias[0] = math.nan
    with pytest.raises(FastjacError, match=r"^the student's logits must be finite"):
        noise_expansion(student, teacher, x, [0.1])
    with pytest.raises(FastjacError, match="the teacher's Jacobian of sample 2 has"):
        normalized_noise_expansion(student, teacher, x, [0.1], y=torch.tensor([2, 2, 1]))
    with pytest.raises(FastjacError, match=r"^sigmas: "):
        normalized_noise_expansion(student, teacher, x, [0.0], y=torch.tensor([2, 2, 1]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("block_bytes", [1, 20_000, 2**28])
@pytest.mark.parametrize("metric", METRICS)
def test_distances_in_blocks(metric, block_bytes, device):
    large, small = torch.randn(700, 5).double(), torch.randn(300, 5).double()
    if metric == "angular":
        expected = torch.tensor(cdist(large, small, "cosine")).neg().add(1).arccos()
    else:
        expected = torch.tensor(cdist(large, small, SCIPY[metric]))
    if block_bytes == 1:  # a distance at a time
        large, small, expected = large[:20], small[:10], expected[:20, :10]
    sets = large.to(device), small.to(device)
    distances, index = nearest_distances(*sets, metric, block_bytes=block_bytes)
    assert distances.device.type == device
    torch.testing.assert_close(distances.cpu(), expected.amin(1))
    assert torch.equal(index.cpu(), expected.argmin(1))
    found = hausdorff(*sets, metric, block_bytes=block_bytes)
    assert found.distance == pytest.approx(expected.amin(1).max().item(), rel=1e-12)
    assert found.point == int(expected.amin(1).argmax())
    assert found.nearest == int(expected[found.point].argmin())


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (5000, 3)], ids=str)
def test_the_hausdorff_distance_is_scipys(shape):
    large, small = torch.randn(shape[0], 2, 3, 4), torch.randn(shape[1], 2, 3, 4).double()
    large = large.double().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    expected, point, nearest = directed_hausdorff(large.flatten(1), small.flatten(1))
    found = hausdorff(large, small)
    assert (found.point, found.nearest) == (point, nearest)
    assert found.distance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_an_offset(dtype):
    large, small = (100 + torch.randn(400, 6)).to(dtype), (100 + torch.randn(90, 6)).to(dtype)
    expected = directed_hausdorff(large.double(), small.double())[0]
    assert hausdorff(large, small).distance == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_superset_is_never_farther(metric, dtype):
    """The corollary of Proposition 3, for growing parts of one set."""
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    for _ in range(5):
        large = 3 + torch.randn(200, 4).to(dtype)
        order = torch.randperm(200)
        sizes = [1, 2, 5, 20, 80, 199, 200]
        found = [hausdorff(large, large[order[:n]], metric).distance for n in sizes]
        assert all(b <= a * (1 + slack) for a, b in itertools.pairwise(found))
        assert found[0] > 0
        assert found[-1] == 0  # exactly: every point is its own nearest
        elsewhere = torch.cat([large[order[:5]], torch.randn(50, 4).to(dtype)])
        assert hausdorff(large, elsewhere, metric).distance <= found[2] * (1 + slack)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("start", [0, 3])
def test_farthest_first_is_the_greedy_choice(metric, start):
    large = 1 + torch.randn(40, 3).double()
    small = torch.randn(start, 3).double() if start else None
    asked = []
    found = farthest_first(large, small, 6, metric, progress=lambda r: asked.extend(r) or r)
    assert asked == list(range(6))
    assert found.picks.unique().numel() == 6
    for n in range(7):
        have = large[found.picks[:n]]
        have = have if small is None else torch.cat([small, have])
        if not len(have):
            assert found.distances[0] == math.inf
            rows = F.normalize(large) if metric == "angular" else large
            assert found.picks[0] == (rows - rows.mean(0)).norm(dim=1).argmin()
            continue
        now = hausdorff(large, have, metric)
        assert found.distances[n].item() == pytest.approx(now.distance, rel=1e-9)
        if n < 6:
            assert found.picks[n] == now.point


def test_farthest_first_is_within_twice_the_best():
    large = torch.randn(11, 2).double()
    found = farthest_first(large, k=3).distances[-1]
    best = min(
        hausdorff(large, large[list(c)]).distance for c in itertools.combinations(range(11), 3)
    )
    assert best <= found <= 2 * best


def test_all_points_and_equal_points_can_be_picked():
    found = farthest_first(torch.tensor([[0.0], [0.0], [2.0]]), k=3)
    assert sorted(found.picks.tolist()) == [0, 1, 2]
    assert found.distances[1:].tolist() == [2, 0, 0]


def test_the_transfer_bound():
    """Of networks on real images: with any K that is large enough, and with the estimate."""
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = torch.tensor(sklearn.load_digits().data)[:600] / 16
    student, teacher = (
        nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)
    )

    def losses(
        x: Tensor,
    ) -> Tensor:  # Lipschitz: the sum of the absolute differences of the outputs
        return (student.double()(x) - teacher.double()(x)).abs().sum(1).detach()

    norms = [m[0].weight.norm() * m[2].weight.norm() for m in (student.double(), teacher.double())]
    most = math.sqrt(3) * sum(norms).item()
    for part in (digits[:20], digits[:200]):
        given = (digits, part, losses(digits), losses(part))
        known = transfer_bound(*given, lipschitz=most)
        guessed = transfer_bound(*given, pairs=2000)
        assert known.bound == known.max_small + most * known.hausdorff
        assert known.mean_large == losses(digits).mean().item()
        assert known.hausdorff == pytest.approx(directed_hausdorff(digits, part)[0])
        assert guessed.hausdorff == pytest.approx(known.hausdorff)
        assert 0 < guessed.lipschitz < most
        assert known.mean_large <= guessed.bound < known.bound
        assert losses(digits).max() <= guessed.bound  # so it is no accident


def test_the_estimate_is_a_lower_bound():
    points = torch.rand(300, 4).double()
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    exact = slope.norm().item()
    few, many = (lipschitz_estimate(points, points @ slope, pairs=n) for n in (10, 20_000))
    assert few < exact
    assert 0.9 * exact < many <= exact * (1 + 1e-9)


POINTS = torch.rand(6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hausdorff(POINTS, POINTS[:0]), r"^the small set is empty: \[0, 3\]"),
        (lambda: hausdorff(POINTS[:0], POINTS), r"^the large set is empty: \[0, 3\]"),
        (lambda: hausdorff(POINTS, POINTS[:, :2]), r"one size; got \[3\] .* and \[2\] \(small\)$"),
        (lambda: hausdorff(POINTS, POINTS.double()), "one dtype and device; got"),
        (lambda: hausdorff(POINTS.long(), POINTS), r"points \[N, ...\]; got torch.int64 \[6, 3\]$"),
        (lambda: hausdorff(POINTS.tolist(), POINTS), "got list$"),
        (lambda: hausdorff(POINTS, POINTS, "euclid"), "^unknown metric 'euclid'; nearest: 'euclidean'"),
        (lambda: hausdorff(broken(2), POINTS), "^the large set has a NaN or an infinity in point 2"),
        (lambda: nearest_distances(POINTS, broken(5)), r"^the small set .* in point 5"),
        (lambda: hausdorff(1e19 * POINTS, POINTS), "^the large set has numbers up to .*: rescale both"),
        (lambda: hausdorff(POINTS, 0 * POINTS, "angular"), "^the small set's point 0 is 0"),
        (lambda: farthest_first(POINTS, k=7), "k must be from 1 to the set's 6 points, got 7$"),
        (lambda: farthest_first(POINTS, k=0), "k must be from 1"),
        (lambda: farthest_first(POINTS, k=2.0), "k must be from 1 .* got 2.0$"),
        (lambda: farthest_first(broken(1), k=1), "in point 1"),
        (lambda: hausdorff(POINTS, POINTS, block_bytes=1e9), "^block_bytes: expected an int, got 1000"),
        (lambda: lipschitz_estimate(POINTS, POINTS[:, 0], pairs=1e5), "^pairs: expected an int"),
        (lambda: bound(large_losses=[0.0] * 6), "the large losses must be a tensor .*, got list$"),
        (lambda: bound(small_losses=torch.zeros(6).cfloat()), "real numbers, got torch.complex64$"),
        (lambda: bound(lipschitz=0.0), "^transfer_bound: lipschitz must be"),
        (lambda: bound(lipschitz=math.nan), "^transfer_bound: lipschitz"),
        (lambda: bound(large_losses=torch.zeros(5)), r"^the large losses must be one for each of 6"),
        (lambda: bound(small_losses=torch.full((6,), math.nan)), "^the small losses have a NaN"),
        (lambda: bound(large_losses=torch.ones(6)), "^points coincide whose losses differ by 1,"),
        (lambda: lipschitz_estimate(POINTS[:1], torch.zeros(1)), "expected 2 points and 1 pair"),
    ],
)  # fmt: skip
def test_bad_sets(call, message):
    with pytest.raises(FastjacError, match=message):
        call()


def test_the_bound_is_numbers():
    found = bound(lipschitz=torch.tensor(2.0))
    assert type(found.lipschitz) is type(found.bound) is float


@pytest.mark.parametrize("scale", [1e-22, 1e-30])
def test_angles_of_points_near_zero(scale):
    """The squares of such numbers underflow in float32."""
    others = POINTS.flip(0) + 0.1
    found = nearest_distances(scale * POINTS, scale * others, "angular")
    torch.testing.assert_close(found, nearest_distances(POINTS, others, "angular"))


def broken(point: int) -> Tensor:
    points = POINTS.clone()
    points[point, 1] = math.nan if point % 2 else math.inf
    return points


def bound(**change):
    given = {"large_losses": torch.zeros(6), "small_losses": torch.zeros(6)} | change
    return transfer_bound(POINTS, POINTS, **given)


@pytest.mark.parametrize("module", [noise, covering], ids=lambda m: m.__name__)
def test_the_docstrings_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted >= 8
    assert result.failed == 0
