"""The loss terms against their equations, one sample and one number at a time."""

import doctest
import math

import pytest
import torch
from torch import Tensor

import fastjac
from fastjac import losses, reference
from fastjac.errors import FastjacError
from fastjac.losses import (
    activation_match_loss,
    attention_match_loss,
    cross_entropy_jacobian_loss,
    gradient_penalty,
    jacobian_cosine_loss,
    jacobian_match_loss,
    jacobian_norm_penalty,
    masked_jacobian_penalty,
)

MASK = torch.arange(30).view(1, 1, 5, 6) % 3 == 0
# Losses of one Jacobian [4, 3, 5, 6], with the equation for one sample's numbers.
OF_ONE = {
    "norm": (jacobian_norm_penalty, lambda j: sum(v * v for v in j)),
    "wgan-gp": (gradient_penalty, lambda j: (length(j) - 1) ** 2),
    "norm 5": (lambda j: gradient_penalty(j, 5), lambda j: (length(j) - 5) ** 2),
    "norm 0": (lambda j: gradient_penalty(j, 0.0), lambda j: length(j) ** 2),
    "masked": (
        lambda j: masked_jacobian_penalty(j, MASK),
        lambda j: sum(v * v for k, v in enumerate(j) if k % 30 % 3 == 0),
    ),
}
of_one = pytest.mark.parametrize(("loss", "equation"), OF_ONE.values(), ids=OF_ONE)


def pair(*shape: int, teacher: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=make).double() for s in (shape, teacher or shape))


def length(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values))


def unit(values: list[float]) -> list[float]:
    return [v / length(values) for v in values]


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


@of_one
def test_losses_of_one_jacobian(loss, equation):
    j, _ = pair(4, 3, 5, 6)
    expected = sum(map(equation, j.flatten(1).tolist())) / 4
    assert loss(j).item() == pytest.approx(expected, rel=1e-13)
    rows = j.unflatten(1, (3, 1))  # [B, K, ...]: K counts to the norm
    if loss is not OF_ONE["masked"][0]:
        assert loss(rows).item() == pytest.approx(expected, rel=1e-13)


@of_one
def test_their_derivatives(loss, equation):
    j = pair(4, 3, 5, 6)[0].requires_grad_()
    assert torch.autograd.gradcheck(loss, j)
    assert torch.autograd.gradgradcheck(loss, j)


@of_one
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(loss, equation, dtype):
    j = (300 * pair(4, 3, 5, 6)[0]).to(dtype).requires_grad_()  # squares overflow float16
    got, expected = loss(j), loss(j.detach().float())
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    (grad,) = torch.autograd.grad(got, j)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@of_one
def test_a_zero_jacobian_has_a_finite_gradient(loss, equation):
    j, _ = pair(4, 3, 5, 6)
    j[0] = 0
    value = loss(j.requires_grad_())
    (grad,) = torch.autograd.grad(value, j)
    assert value.isfinite()
    assert grad[0].count_nonzero() == 0
    assert grad.isfinite().all()
    assert (grad[1:].flatten(1).norm(dim=1) > 0).all()


def test_jacobian_cosine():
    js, jt = pair(4, 3, 5, 6)
    samples = zip(js.flatten(1).tolist(), jt.flatten(1).tolist(), strict=True)
    cosines = [sum(a * b for a, b in zip(unit(s), unit(t), strict=True)) for s, t in samples]
    expected = sum(1 - c for c in cosines) / 4
    assert jacobian_cosine_loss(js, jt).item() == pytest.approx(expected, rel=1e-13)
    assert jacobian_cosine_loss(9 * js, jt / 7).item() == pytest.approx(expected, rel=1e-13)
    assert jacobian_cosine_loss(js, -js).item() == pytest.approx(2, rel=1e-13)
    assert torch.autograd.gradcheck(jacobian_cosine_loss, (js.requires_grad_(), jt))
    assert torch.autograd.gradcheck(jacobian_cosine_loss, (js, jt.requires_grad_()))


def test_the_cosine_does_not_cancel():
    js = pair(4, 300)[0].float()
    jt = js * (1 + 1e-4 * pair(300, 4)[1].float().view(4, 300))
    exact = jacobian_cosine_loss(js.double(), jt.double()).item()
    assert 0 < exact < 1e-7
    assert jacobian_cosine_loss(js, jt).item() == pytest.approx(exact, rel=1e-3)
    assert jacobian_cosine_loss(js, js) == 0


def test_the_cosine_of_zeros_and_of_low_precision():
    js, jt = pair(3, 4, 5)
    js[0], js[1], jt[1] = 0, 0, 0
    value = jacobian_cosine_loss(js.requires_grad_(), jt)
    expected = jacobian_cosine_loss(js[2:], jt[2:])
    assert value.item() == pytest.approx((0.5 + 0 + expected.item()) / 3)
    (grad,) = torch.autograd.grad(value, js)
    assert grad[:2].count_nonzero() == 0
    assert grad[2].norm() > 0
    low = (300 * js.detach()).half(), (300 * jt).half()
    assert jacobian_cosine_loss(*low).dtype == torch.float32
    assert jacobian_cosine_loss(*low).item() == pytest.approx(value.item(), rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 1, 5, 6), (1, 3, 1, 1), (1, 1, 1, 1)], ids=str)
def test_masks_are_numbers_too(shape):
    j, weight = pair(4, 3, 5, 6, teacher=shape)
    expected = (j * weight).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(masked_jacobian_penalty(j, weight), expected)
    on = weight > 0
    expected = torch.where(on, j, 0.0).square().flatten(1).sum(1).mean()
    for mask in (on, on.long(), on.half()):
        torch.testing.assert_close(masked_jacobian_penalty(j, mask), expected)


# With labels in the place of the teacher's logits, the paper's term is none.
CROSS_ENTROPY = [("all", False), ("logarithm", False), ("paper", False)]
CROSS_ENTROPY += [("all", True), ("logarithm", True)]
cross_entropy = pytest.mark.parametrize(("terms", "labels"), CROSS_ENTROPY)
LABELS = torch.tensor([2, 0, 1])


def soft_pair(labels: bool) -> tuple[Tensor, ...]:
    """ls, lt, js and jt for three samples of four classes."""
    logits, jacobians = pair(3, 4), pair(3, 4, 5, 2)
    teacher = (LABELS, None) if labels else (logits[1], jacobians[1])
    return logits[0], teacher[0], jacobians[0], teacher[1]


@cross_entropy
def test_cross_entropys_jacobians(terms, labels):
    """By the reference, and by differences of the cross-entropy along each input dimension."""
    ls, lt, js, jt = soft_pair(labels)
    loss = cross_entropy_jacobian_loss(ls, lt, js, jt, terms)
    expected = reference.cross_entropy_jacobian_loss(ls, lt, js, jt, terms)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    if terms != "all":
        return
    step, second = 1e-4, 0.0

    def value(s: Tensor, t: Tensor) -> float:
        return torch.nn.functional.cross_entropy(s, t if labels else t.softmax(1)).item()

    for k in range(10):
        ds = step * js.flatten(2)[:, :, k]
        dt = 0 if labels else step * jt.flatten(2)[:, :, k]
        second += value(ls + ds, lt + dt) - 2 * value(ls, lt) + value(ls - ds, lt - dt)
    assert loss.item() == pytest.approx(second / step**2 / 2, rel=1e-5)


@cross_entropy
def test_their_gradients(terms, labels):
    ls, lt, js, jt = soft_pair(labels)
    given = [t.requires_grad_() for t in (ls, js)]
    got, expected = (
        torch.autograd.grad(module.cross_entropy_jacobian_loss(ls, lt, js, jt, terms), given)
        for module in (losses, reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@cross_entropy
def test_cross_entropys_gradient_through_the_engine(terms, labels):
    """Every parameter's gradient equals that of the double backward, in float64."""
    torch.manual_seed(0)
    student = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()),
        *(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)),
    ).double()
    x = torch.randn(3, 1, 6, 6).double()
    _, lt, _, jt = soft_pair(labels)
    jt = None if labels else torch.randn(3, 4, 1, 6, 6).double()
    gradients = []
    for strategy, module in (("auto", losses), ("autograd", reference)):
        out = fastjac.with_jacobian(student, x, fastjac.Logits(), strategy=strategy)
        loss = module.cross_entropy_jacobian_loss(out.output, lt, out.jacobian, jt, terms)
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert all(g.norm() > 0 for g in gradients[0][2:])


def test_a_student_that_matches_is_the_minimum():
    """Of the logarithm's form; the paper's term falls without a bound as the Jacobian grows."""
    _, lt, _, jt = soft_pair(False)
    form = [
        cross_entropy_jacobian_loss(lt, lt, k * jt, jt, "logarithm").item() for k in (0.9, 1, 1.1)
    ]
    assert form[1] < min(form[0], form[2])
    (slope,) = torch.autograd.grad(
        cross_entropy_jacobian_loss(lt, lt, jt.requires_grad_(), jt.detach(), "logarithm"), jt
    )
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)
    assert cross_entropy_jacobian_loss(lt, lt, 1e6 * jt, jt, "paper") < -1e5


def test_where_the_students_probabilities_are_the_teachers():
    """``"all"`` and ``"logarithm"`` differ by a constant of the teacher's."""
    ls, lt, js, jt = soft_pair(False)

    def difference(logits: Tensor, j: Tensor) -> float:
        forms = [cross_entropy_jacobian_loss(logits, lt, j, jt, t) for t in ("all", "logarithm")]
        return (forms[0] - forms[1]).item()

    assert difference(lt, js) == pytest.approx(difference(lt, jt), rel=1e-12)
    assert difference(ls, js) != pytest.approx(difference(ls, jt), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropys_jacobians_in_low_precision(dtype):
    ls, lt, js, jt = (t.to(dtype) for t in soft_pair(False))
    got = cross_entropy_jacobian_loss(ls, lt, 300 * js, 300 * jt)
    assert got.dtype == torch.float32
    assert torch.equal(
        got, cross_entropy_jacobian_loss(*(t.float() for t in (ls, lt, 300 * js, 300 * jt)))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ls": None}, "^cross_entropy_jacobian_loss: ls must be a tensor, got NoneType$"),
        ({"js": (torch.zeros(3, 4, 5),)}, "js must be a tensor, got tuple; of several targets each"),
        ({"jt": "all"}, "jt must be a tensor, got str$"),
        ({"terms": "al"}, "^unknown terms 'al' in cross_entropy_jacobian_loss; nearest: 'all'"),
        ({"jt": None}, "jt is missing; only labels"),
        ({"lt": LABELS}, "labels have no Jacobian; expected jt=None"),
        ({"lt": LABELS, "jt": None, "terms": "paper"}, "terms 'all' or 'logarithm', got 'paper'$"),
        ({"lt": LABELS + 2, "jt": None}, "labels"),
        ({"lt": [0, 1, 2], "jt": None}, r"labels y: expected int64 \[3\]"),
        ({"lt": torch.zeros(3, 5)}, r"jt must have a row .* \[3, 5, ...\]; got .*\[3, 4, 5, 2\]$"),
        ({"js": torch.zeros(3, 4)}, r"js must have a row .* \[3, 4, ...\]; got .*\[3, 4\]$"),
        ({"jt": torch.zeros(3, 4, 5, 3)}, r"js's shape, \[3, 4, 5, 2\], got \[3, 4, 5, 3\]$"),
        ({"ls": torch.zeros(3)}, r"ls must be floating-point logits \[B, K\]; .*\[3\]$"),
        ({"lt": torch.full((3, 4), math.nan)}, "lt must be finite logits; those of sample 0 are not"),
        ({"ls": torch.tensor([[0.0] * 4, [0, 0, math.inf, 0], [0] * 4])}, "ls .* sample 1 are not"),
    ],
)  # fmt: skip
def test_bad_input_of_the_cross_entropy(change, message):
    given = dict(zip(("ls", "lt", "js", "jt"), soft_pair(False), strict=True)) | change
    with pytest.raises(FastjacError, match=message):
        cross_entropy_jacobian_loss(**given)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dead_features_give_a_finite_loss_and_gradient(dtype):
    fs, ft = (t.to(dtype) for t in pair(2, 3, 4, 4))
    fs[0] = 0
    loss = attention_match_loss(fs.requires_grad_(), ft)
    loss.backward()
    assert loss.isfinite()
    assert fs.grad.isfinite().all()
    assert fs.grad[1].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss", "shape"), [(activation_match_loss, (3, 4)), (attention_match_loss, (2, 3, 3, 2))]
)
def test_the_others_in_low_precision(loss, shape, dtype):
    low = [(300 * t).to(dtype) for t in pair(*shape)]  # squares overflow float16
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(*low)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(*(t.float() for t in low)))


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
        (
            jacobian_cosine_loss,
            ((2, 3), (1, 3)),
            r"^jacobian_cosine_loss: jt must have js's shape, \[2, 3\], got \[1, 3\]$",
        ),
        (jacobian_cosine_loss, ((2,), (2,)), r"js must be floating-point \[B, ...\]; .*\[2\]$"),
        (jacobian_norm_penalty, ((2,),), r"^jacobian_norm_penalty: j must be .*float32 \[2\]$"),
        (gradient_penalty, ((),), r"^gradient_penalty: j must be .*float32 \[\]$"),
        (
            masked_jacobian_penalty,
            ((2, 3, 4, 4), (2, 3, 4, 3)),
            r"mask must have 4 dimensions, each of size 1 or j's, \[2, 3, 4, 4\]; got \[2, 3, 4, 3\]",
        ),
        (masked_jacobian_penalty, ((3, 3, 4, 4), (3, 4, 4)), r"4 dimensions, .* got \[3, 4, 4\]$"),
    ],
)
def test_shapes(loss, shapes, message):
    with pytest.raises(FastjacError, match=message):
        loss(*map(torch.zeros, shapes))


def test_bad_values():
    with pytest.raises(FastjacError, match=r"must be floating-point .*int64 \[2, 3\]$"):
        jacobian_norm_penalty(torch.zeros(2, 3).long())
    for wrong in (-1, math.nan, math.inf, "1", torch.ones(())):
        with pytest.raises(FastjacError, match=r"^gradient_penalty: norm must be a number from 0"):
            gradient_penalty(torch.zeros(2, 3), wrong)


def test_the_examples_run():
    result = doctest.testmod(losses)
    assert result.attempted >= 20
    assert result.failed == 0


@pytest.mark.parametrize("loss", [jacobian_norm_penalty, gradient_penalty])
def test_a_result_in_the_place_of_its_jacobian_is_an_error(loss):
    out = fastjac.with_jacobian(torch.nn.Linear(3, 2), torch.ones(4, 3), fastjac.Logits())
    with pytest.raises(
        FastjacError, match=r"j must be a tensor, got JacobianOutput; its .jacobian"
    ):
        loss(out)
    with pytest.raises(FastjacError, match="j must be a tensor, got tuple; of several targets"):
        loss((out.jacobian, out.jacobian))


def test_norms_may_be_numpys():
    numpy = pytest.importorskip("numpy")
    j = torch.ones(2, 4)  # of the norm 2
    for norm in (numpy.float32(3), numpy.int64(3), 3):
        assert gradient_penalty(j, norm) == 1


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (activation_match_loss, (None, torch.ones(2, 3)), r"^activ.*: ls must be a tensor, got Non"),
        (activation_match_loss, (torch.ones(2, 3).long(),) * 2, r"ls must be floating-.* \[2, 3\]$"),
        (attention_match_loss, (torch.ones(2, 1, 3, 3), None), r"^atten.*: ft must be a tensor, got"),
        (attention_match_loss, (torch.ones(2, 1, 3, 3).cfloat(),) * 2, r"fs must be .*complex64"),
        (jacobian_match_loss, ((torch.ones(2, 3),), torch.ones(2, 3)), "js must be a tensor.* of se"),
        (masked_jacobian_penalty, (torch.ones(2, 3), torch.ones(2, 3).cfloat()), "mask must be bool"),
        (masked_jacobian_penalty, (torch.ones(2, 3), [[1.0]]), r"mask must be a tensor, got list$"),
    ],
)  # fmt: skip
def test_arguments_that_are_no_real_tensors(loss, given, message):
    with pytest.raises(FastjacError, match=message):
        loss(*given)


def test_arguments_of_another_kind_are_errors():
    j = torch.ones(2, 3)
    with pytest.raises(FastjacError, match=r"mask must be a tensor, got NoneType$"):
        masked_jacobian_penalty(j, None)
    with pytest.raises(FastjacError, match="normalize must be True or False, got 'yes'"):
        fastjac.jacobian_match_loss(j, j, "yes")
