"""Which scalar is differentiated: the definitions as loops, and where a window stands."""

import doctest
import math

import pytest
import torch
from torch import Tensor

from fastjac import JacobianMatching, targets
from fastjac.errors import FastjacError
from fastjac.ops.window_crop import window_crop_adjoint
from fastjac.targets import (
    AttentionWindow,
    LabelLogit,
    Logits,
    Projection,
    Scalar,
    Target,
    check_targets,
)

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
            phi = target.at(torch.tensor([[i, j]] * 2)).scalar(None, z, None)[b]
            assert phi.item() == pytest.approx(pooled[b][i][j], rel=1e-12)
    assert target.position(z).dtype == torch.int64
    assert torch.equal(target.scalar(None, z, None), target.pooled(z).flatten(1).amax(1))


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
    target = AttentionWindow("z", 1 / 2, power).at(torch.tensor([[0, 1], [2, 2]]))
    z = features(2, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: target.scalar(None, z, None), z)
    assert torch.autograd.gradgradcheck(lambda z: target.scalar(None, z, None), z)


@POWERS
def test_dead_features_have_finite_derivatives(power):
    target = AttentionWindow("z", 1 / 2, power).at(torch.tensor([[0, 1]]))
    z = torch.zeros(1, 2, 4, 4).double().requires_grad_()
    phi = target.scalar(None, z, None)
    (slope,) = torch.autograd.grad(phi.sum(), z, create_graph=True)
    assert phi == slope.count_nonzero() == 0
    if power >= 2:
        (bend,) = torch.autograd.grad(slope.sum(), z)
        assert bend.isfinite().all()
        assert bend.count_nonzero() == (8 if power == 2 else 0)


@POWERS
def test_the_windows_head_is_the_scalars_derivatives(power):
    target, z = AttentionWindow("z", 1 / 2, power), features(2, 3, 6, 5).requires_grad_()
    tangent = features(2, 3, 3, 3, seed=1)
    for each in (target, target.at(torch.tensor([[0, 1], [3, 2]]))):
        head = each.head(None, z, None)
        assert (head.reads, head.side) == ("features", 3)
        assert torch.equal(head.position, each.start(z))
        phi = each.scalar(None, z, None)
        (grad,) = torch.autograd.grad(phi.sum(), z, create_graph=True)
        full = [window_crop_adjoint(t, head.position, z.shape[2:]) for t in (head.grad, tangent)]
        torch.testing.assert_close(full[0], grad.detach(), **EXACT)
        assert (head.hvp is None) == (power == 1)
        if head.hvp is not None:
            (curvature,) = torch.autograd.grad(grad, z, full[1])
            got = window_crop_adjoint(head.hvp(tangent), head.position, z.shape[2:])
            torch.testing.assert_close(got, curvature, **EXACT)


# Where the window stands


def test_a_given_position():
    z, position = features(3, 2, 10, 10), torch.tensor([[0, 8], [4, 4], [1, 0]])
    target = AttentionWindow("z").at(position)
    assert target.start(z) is position
    assert target.placed(z).start(z) is position
    with pytest.raises(FastjacError, match=r"^position: expected int64 \[3, 2\], got torch.int32"):
        AttentionWindow("z").at(position.int()).scalar(None, z, None)
    with pytest.raises(
        FastjacError, match=r"^position: expected int64 \[3, 2\], got torch.int64 \[2, 2\]$"
    ):
        AttentionWindow("z").at(position[:2]).head(None, z, None)
    with pytest.raises(FastjacError, match=r"^position: expected int64 \[3, 2\], got list$"):
        AttentionWindow("z").at([[0, 0]]).start(z)
    for wrong in ([9, 0], [0, 9], [-1, 3]):
        with pytest.raises(FastjacError, match=r"^position: expected 0 to \[8, 8\], got \["):
            AttentionWindow("z").at(torch.tensor([wrong] * 3)).placed(z)
    nothing = AttentionWindow("z").at(position[:0]).scalar(None, z[:0], None)
    assert nothing.shape == (0,)


def test_placed_fixes_the_argmax():
    z, later = features(3, 2, 10, 10), features(3, 2, 10, 10, seed=1)
    target = AttentionWindow("z")
    placed = target.placed(z)
    assert torch.equal(placed.start(later), target.position(z))
    assert placed.start(later) is placed.placed(later).start(z)
    assert not torch.equal(target.start(later), target.start(z))


@pytest.mark.parametrize("size", [(10, 10), (21, 13)], ids=str)
def test_the_student_is_paired_with_the_teachers_window(size):
    z_t, z_s = features(3, 2, 10, 10), features(3, 4, *size, seed=1)
    for anchor in ("teacher", "own"):
        target = AttentionWindow("s", anchor=anchor, teacher_layer="t")
        teacher = target.for_teacher().placed(z_t)
        student = target.paired(teacher, z_t, None)
        position = teacher.position(z_t)
        expected = target.position(z_s)
        if anchor == "teacher":
            expected = target.transfer(position, z_t, z_s)
        assert student.layer == "s"
        assert torch.equal(student.start(z_s), expected)
        assert torch.equal(student.placed(z_s).start(z_s), expected)
        assert torch.equal(
            student.scalar(None, z_s, None), target.at(expected).scalar(None, z_s, None)
        )
        if size == (10, 10) and anchor == "teacher":  # engines compare positions by identity
            assert student.start(z_s) is teacher.start(z_t)


def test_a_given_position_is_the_teachers():
    z_t, z_s = features(3, 2, 10, 10), features(3, 4, 20, 20, seed=1)
    target = AttentionWindow("s").at(torch.tensor([[8, 8], [0, 0], [3, 4]]))
    teacher = target.for_teacher().placed(z_t)
    student = target.paired(teacher, z_t, None)
    assert teacher.start(z_t).tolist() == [[8, 8], [0, 0], [3, 4]]
    assert student.start(z_s).tolist() == [[16, 16], [0, 0], [6, 8]]
    with pytest.raises(
        FastjacError, match="needs an AttentionWindow for the teacher; got LabelLog"
    ):
        target.paired(LabelLogit(), z_t, None)


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


# The label's logit


def test_the_label_logits_definition():
    logits, y = features(5, 7).requires_grad_(), torch.tensor([6, 0, 3, 3, 1])
    phi = LabelLogit().scalar(logits, None, y)
    assert phi.tolist() == [logits[i, y[i]].item() for i in range(5)]
    head = LabelLogit().head(logits, None, y)
    assert (head.reads, head.hvp, head.position, head.side) == ("output", None, None, None)
    assert torch.equal(head.grad, torch.autograd.grad(phi.sum(), logits)[0])


@pytest.mark.parametrize("method", ["scalar", "head"])
@pytest.mark.parametrize(
    ("logits", "y", "message"),
    [
        (torch.empty(2, 3), None, "^LabelLogit needs the labels y; got None$"),
        (torch.empty(2, 3), [0, 1], r"^labels y: expected int64 \[2\], got list; torch.as_tensor"),
        (
            torch.empty(2, 3),
            torch.ones(2),
            r"expected int64 \[2\], got float32 \[2\]; for regression",
        ),
        (torch.empty(2, 3), torch.ones(2).int(), r"\[2\], got int32 \[2\]; y\.long\(\) converts$"),
        (
            torch.empty(2, 3),
            torch.eye(3)[:2],
            r"float32 \[2, 3\]; y\.argmax\(1\) gives the classes",
        ),
        (torch.empty(2, 3), torch.ones(2, 1).long(), r"int64 \[2, 1\]; y\.flatten\(\) drops"),
        (
            torch.empty(2, 3),
            torch.tensor([0, -100]),
            r"^labels y: expected 0 to 2, got -100 to 0; leave out unl",
        ),
        (torch.empty(2, 3), torch.ones(3).long(), r"expected int64 \[2\], got int64 \[3\]$"),
        (torch.empty(2, 3), torch.tensor([0, 3]), "^labels y: expected 0 to 2, got 0 to 3$"),
        (torch.empty(2, 3, 1), torch.tensor([0, 1]), r"the model gave \[2, 3, 1\]$"),
        ({}, torch.tensor([0, 1]), "the model gave dict: name its logits with output=$"),
    ],
)
def test_label_logit_errors(logits, y, message, method):
    with pytest.raises(FastjacError, match=message):
        getattr(LabelLogit(), method)(logits, None, y)


# Functions, rows of logits, random projections


def test_scalar_takes_the_output_or_a_layers_features():
    output, z, y = features(3, 4), features(3, 2, 5, 5, seed=1), torch.tensor([1.0, 2.0, 3.0])
    calls = []

    def function(tensor: Tensor, y: Tensor) -> Tensor:
        calls.append((tensor, y))
        return tensor.flatten(1).sum(1) * y

    assert torch.equal(Scalar(function).scalar(output, None, y), output.sum(1) * y)
    assert torch.equal(Scalar(function, "z").scalar(output, z, y), z.flatten(1).sum(1) * y)
    assert calls[0][0] is output
    assert calls[1][0] is z
    assert calls[1][1] is y
    assert (Scalar(function).layer, Scalar(function, "z").layer) == (None, "z")
    assert Scalar(function).head(output, None, y) is None
    with pytest.raises(FastjacError, match=r"function must be callable .*; got str"):
        Scalar("z")
    with pytest.raises(FastjacError, match=r"Scalar: layer is a name of named_modules\(\); got 1"):
        Scalar(len, layer=1)


@pytest.mark.parametrize("indices", [None, (3, 0), [2], range(3), torch.tensor([1, 1])], ids=str)
def test_logits_are_the_chosen_columns(indices):
    output = features(3, 4).requires_grad_()
    phi = Logits(indices).scalar(output, None, None)
    chosen = range(4) if indices is None else [int(k) for k in indices]
    assert phi.tolist() == [[output[i, k].item() for k in chosen] for i in range(3)]
    weight = features(*phi.shape, seed=1)
    (got,) = torch.autograd.grad((phi * weight).sum(), output)
    expected = torch.zeros(3, 4).double()
    for column, k in enumerate(chosen):
        expected[:, k] += weight[:, column]
    torch.testing.assert_close(got, expected, **EXACT)


def test_logits_errors():
    for wrong in ([], [-1], [0.5], "ab", 3, {0}, [True], torch.tensor([True, False])):
        with pytest.raises(FastjacError, match=r"^Logits: indices must be ints from 0"):
            Logits(wrong)
    with pytest.raises(FastjacError, match=r"^Logits: expected indices from 0 to 2, got 3$"):
        Logits([0, 3]).scalar(torch.empty(2, 3), None, None)
    with pytest.raises(FastjacError, match=r"^Logits needs logits .*gave \[2, 3, 1\]$"):
        Logits().scalar(torch.empty(2, 3, 1), None, None)


def test_projections_are_of_their_rows():
    output, target = features(3, 2, 4), Projection(5, torch.Generator().manual_seed(0)).drawn()
    rows = target.rows(output.flatten(1))
    assert rows.shape == (3, 5, 8)
    expected = torch.einsum("bnd,bd->bn", rows, output.flatten(1))
    torch.testing.assert_close(target.scalar(output, None, None), expected, **EXACT)
    assert len(set(rows.flatten().tolist())) == rows.numel()  # each sample, each row its own


def test_projections_keep_the_squared_norm_on_average():
    """w w^T, summed over the rows, is the identity on average: so is J^T w w^T J's trace ||J||^2."""
    target, flat = Projection(2, torch.Generator().manual_seed(0)), torch.empty(4000, 3)
    rows = target.rows(flat).double()
    mean = torch.einsum("bnd,bne->de", rows, rows) / len(rows)
    assert (mean - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / 2 / 4000)


def test_projections_are_drawn_anew_unless_fixed():
    output = features(3, 4)
    target = Projection(2, torch.Generator().manual_seed(0))
    first, second = (target.scalar(output, None, None) for _ in range(2))
    assert not torch.equal(first, second)
    fixed = target.drawn()
    assert fixed.drawn() is fixed
    assert target.drawn().rows(output).ne(fixed.rows(output)).any()
    again = Projection(2, torch.Generator().manual_seed(0))
    assert torch.equal(again.scalar(output, None, None), first)
    for dtype in (torch.float32, torch.bfloat16):  # two networks of two dtypes share the rows
        assert torch.equal(fixed.rows(output.to(dtype)), fixed.rows(output).to(dtype))
    torch.manual_seed(3)
    default = Projection(2).scalar(output, None, None)
    torch.manual_seed(3)
    assert torch.equal(Projection(2).drawn().scalar(output, None, None), default)


def test_ints_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert Logits(numpy.array([2, 0])) == Logits([numpy.int64(2), 0]) == Logits([2, 0])
    assert Projection(numpy.int64(2)).scalar(torch.ones(3, 4), None, None).shape == (3, 2)


def test_projection_errors():
    for wrong in (0, -1, 1.5, None, True):
        with pytest.raises(FastjacError, match=r"^Projection: n must be a positive int"):
            Projection(wrong)
    with pytest.raises(FastjacError, match=r"needs an output \[B, ...\]; the model gave \[3\]"):
        Projection(2).scalar(torch.empty(3), None, None)
    with pytest.raises(FastjacError, match="the model gave tuple"):
        Projection(2).scalar((), None, None)


# What all have


class Norm(Target):
    def scalar(self, output, features, y):
        return output.norm(dim=1)


def test_a_users_target_needs_a_scalar_alone():
    target, z = Norm(), features(2, 3)
    assert (target.layer, target.normalize) == (None, False)
    assert target.head(z, None, None) is None
    same = (target.for_teacher(), target.placed(z), target.paired(target, z, None), target.drawn())
    assert all(each is target for each in same)
    with pytest.raises(FastjacError, match=r"^Target must define scalar\(output, features, y\)$"):
        Target().scalar(z, None, None)


def test_defaults():
    assert AttentionWindow("z").normalize is True
    assert LabelLogit().normalize is Scalar(len).normalize is Logits().normalize is False
    assert (AttentionWindow("z").window, AttentionWindow("z").power) == (1 / 5, 2)
    assert AttentionWindow("z").anchor == "teacher"
    assert LabelLogit().layer is Logits().layer is Projection(1).layer is None
    with pytest.raises(TypeError, match="layer"):
        AttentionWindow()
    with pytest.raises(FastjacError, match="layer is a name of named_modules"):
        AttentionWindow(None)


def test_the_teachers_target():
    target = AttentionWindow("a", 1 / 3, 3, "own", teacher_layer="b")
    assert target.for_teacher() == AttentionWindow("b", 1 / 3, 3)
    assert AttentionWindow("a").for_teacher() == AttentionWindow("a")
    assert LabelLogit().for_teacher() == LabelLogit()


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (
            torch.empty(4, 2, 3),
            r"^Norm: scalar must be \[B\] or \[B, K\] with B = 4; got \[4, 2, 3\]; .flatten",
        ),
        (torch.empty(()), r"with B = 4; got \[\]; .*'none'$"),
        (torch.empty(3), r"with B = 4; got \[3\]$"),
        (torch.empty(1, 4), r"with B = 4; got \[1, 4\]$"),
        (2.5, "with B = 4; got float$"),
        (torch.ones(4).long(), "^Norm: scalar must be floating-point; got int64$"),
    ],
)
def test_the_shape_of_phi(phi, message):
    with pytest.raises(FastjacError, match=message):
        Norm().check_scalar(phi, 4)


def test_phis_of_the_right_shape():
    for shape in ((4,), (4, 1), (4, 7), (4, 0)):
        phi = torch.empty(shape)
        assert Norm().check_scalar(phi, 4) is phi


def test_check_targets():
    both = (LabelLogit(), Norm())
    assert check_targets(both) is both
    for wrong, name in (("logit", "str"), (None, "NoneType"), (LabelLogit, "LabelLogit itself")):
        with pytest.raises(FastjacError, match=rf"^target: expected a Target .*; got {name}$"):
            check_targets(wrong)
        with pytest.raises(FastjacError, match=rf"; got {name}$"):
            check_targets((LabelLogit(), wrong))
    with pytest.raises(FastjacError, match="got an empty tuple"):
        check_targets(())


def test_window_errors():
    for method in ("scalar", "head"):
        with pytest.raises(
            FastjacError,
            match=r"^layer 'z' is not a feature map: expected \[B, C, h, w\], got \[2, 3\]$",
        ):
            getattr(AttentionWindow("z"), method)(None, torch.empty(2, 3), None)
    with pytest.raises(
        FastjacError, match=r"a 2x2 window \(0.2 of the height\) is larger .* 10x1 map"
    ):
        AttentionWindow("z").pooled(torch.empty(1, 2, 10, 1))
    for wrong, message in (
        ({"window": 0}, r"window is a share of the map's height, in \(0, 1\]; got 0"),
        ({"window": "half"}, "window is a share .*; got 'half'"),
        ({"power": 1.5}, "power must be 1 or at least 2; got 1.5"),
        ({"power": math.inf}, "power must be 1 or at least 2; got inf"),
        ({"power": "2"}, "power must be 1 or at least 2; got '2'"),
        ({"anchor": "student"}, "anchor is 'teacher' or 'own'; got 'student'"),
    ):
        with pytest.raises(FastjacError, match=message):
            AttentionWindow("z", **wrong)


def test_the_examples_run():
    result = doctest.testmod(targets)
    assert result.attempted > 20
    assert result.failed == 0


def test_labels_on_another_device_are_named():
    """Also where a label below 0 would be filled in."""
    networks = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    matcher = JacobianMatching(*networks, LabelLogit(unlabelled="teacher"))
    with pytest.raises(FastjacError, match="labels y are on meta; the model's logits are on cpu"):
        matcher(torch.rand(2, 4), torch.zeros(2, dtype=torch.int64, device="meta"))


def test_an_image_without_a_label_takes_the_teachers_class():
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    x, y = torch.rand(3, 4), torch.tensor([-1, 2, -1])
    filled = torch.where(y < 0, teacher(x).argmax(1), y)
    losses = [
        JacobianMatching(student, teacher, target)(x, labels).jacobian_loss
        for target, labels in ((LabelLogit(unlabelled="teacher"), y), (LabelLogit(), filled))
    ]
    assert losses[0] == losses[1] > 0


def test_what_stands_for_a_missing_label_is_one_of_two():
    with pytest.raises(FastjacError, match="unlabelled is 'error' or 'teacher'; got 'student'"):
        LabelLogit(unlabelled="student")


def test_only_missing_labels_are_the_teachers():
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 3)
    labels = LabelLogit(unlabelled="teacher").labels(torch.tensor([0, -1, 1]), logits)
    assert labels.tolist() == [0, 2, 1]


def test_a_missing_label_needs_the_teachers_logits():
    target, y = LabelLogit(unlabelled="teacher"), torch.tensor([0, -1, 1])
    with pytest.raises(
        FastjacError, match=r"needs logits \[B, classes\]; the model gave \[3, 4, 4\]"
    ):
        target.labels(y, torch.rand(3, 4, 4))
    with pytest.raises(FastjacError, match="the model gave dict: name its logits with output="):
        target.labels(y, {"logits": torch.rand(3, 4)})
