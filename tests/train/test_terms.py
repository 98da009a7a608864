"""The objective's terms: each against its equation, its gradient against plain autograd, its errors."""

import doctest
import functools

import pytest
import torch
import torch.nn.functional as F

from fastjac import FastjacError, reference, targets
from fastjac.data import ImageData
from fastjac.models import ModelSpec, create_model
from fastjac.models.levels import level_layer
from fastjac.train import terms
from fastjac.train.objective import Distillation
from fastjac.train.options import StudentOptions

SIZE, CLASSES = 16, 4


def networks(classes=CLASSES):
    return _networks(classes)


@functools.cache
def _networks(classes):
    torch.manual_seed(0)
    student = create_model(ModelSpec("vgg", CLASSES, 1, plan="4 M 6 M 6 M"))
    teacher = create_model(ModelSpec("vgg", classes, 1, plan="6 M 8 M 8 M"))
    for net in (student, teacher):
        for name, value in net.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
    return student.double(), teacher.double()


@functools.cache
def images():
    torch.manual_seed(1)
    x, y = torch.rand(6, 1, SIZE, SIZE).double(), torch.tensor([0, 3, 1, 1, 2, 0])
    dataset = torch.utils.data.TensorDataset(x.float(), y)
    names = [str(k) for k in range(CLASSES)]
    return x, y, ImageData("toy", dataset, dataset, y.tolist(), names, 1, SIZE, (0.0,), (1.0,))


def objective(classes=CLASSES, **given):
    student, teacher = networks(classes)
    options = StudentOptions(teacher_cache=given.pop("teacher_cache", "off"), **given)
    torch.manual_seed(2)
    built = Distillation(options, student.train(), teacher, images()[2], classes)
    built.heads.double()
    return built


def gradients(loss, module):
    names, parameters = zip(
        *((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True
    )
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def outputs(x):
    student, teacher = networks()
    with torch.no_grad():
        lt = teacher(x)
    return student(x), lt


def test_docstrings():
    assert doctest.testmod(terms).failed == 0


def test_label_cross_entropy():
    logits = torch.randn(5, 3).double()
    y = torch.tensor([2, -1, 0, -100, 1])
    expected = sum(F.cross_entropy(logits[i : i + 1], y[i : i + 1]) for i in (0, 2, 4)) / 5
    assert torch.allclose(terms.label_cross_entropy(logits, y), expected)
    soft = torch.rand(5, 3).double()
    assert torch.equal(terms.label_cross_entropy(logits, soft), F.cross_entropy(logits, soft))
    assert terms.label_cross_entropy(logits, torch.full((5,), -1)) == 0


def test_kd_is_the_divergence_at_that_temperature():
    ls, lt = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    p, q = (lt / 3).softmax(1), (ls / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(terms.knowledge_distillation_loss(ls, lt, 3.0), expected)


def test_dkd_splits_the_divergence():
    ls, lt, y = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor([0, 4, 2, 2])
    p, q = (lt / 2).softmax(1), (ls / 2).softmax(1)
    expected = 0.0
    for i, k in enumerate(y.tolist()):
        pt, qt = p[i, k], q[i, k]
        expected += pt * (pt / qt).log() + (1 - pt) * ((1 - pt) / (1 - qt)).log()
        for j in set(range(5)) - {k}:
            a, b = p[i, j] / (1 - pt), q[i, j] / (1 - qt)
            expected += 8 * a * (a / b).log()
    found = terms.decoupled_distillation_loss(ls, lt, y, 2.0)
    assert torch.allclose(found, 4 * expected / 4)


@pytest.mark.parametrize("target", ["label-logit", "logits", "cross-entropy", "attention-window"])
@pytest.mark.parametrize("term", ["jacobians", "jacobian_norm"])
def test_jacobian_terms_are_the_double_backwards(target, term):
    x, y, _ = images()
    found, expected = (
        objective(**{term: 1.0}, target=target, window=0.5, strategy=strategy)
        for strategy in ("auto", "autograd")
    )
    one, other = found(x, y), expected(x, y)
    assert torch.allclose(one.loss, other.loss, rtol=1e-9)
    mine, theirs = gradients(one.loss, found.student), gradients(other.loss, expected.student)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, rtol=1e-8, atol=1e-9 * gradient.abs().max()), (
            name
        )


def test_several_levels_are_added():
    x, y, _ = images()
    both = objective(jacobians=1.0, target="attention-window", levels=[1, 2], window=0.5)
    alone = [
        objective(jacobians=1.0, ce=0.0, target="attention-window", level=n, window=0.5)
        for n in (1, 2)
    ]
    parts = [each(x, y).terms["jacobians"] for each in alone]
    found = both(x, y)
    assert torch.allclose(found.terms["jacobians"], sum(parts), rtol=1e-9)
    gradient = gradients(found.terms["jacobians"], both.student)
    for name, one in gradients(sum(parts), both.student).items():
        assert torch.allclose(gradient[name], one, rtol=1e-8, atol=1e-9 * one.abs().max())


def test_projections_are_drawn_anew_for_both_networks():
    x, y, _ = images()
    student, teacher = networks()
    built = objective(jacobians=1.0, target="projection", projections=2)
    torch.manual_seed(5)
    first = built(x, y).terms["jacobians"]
    assert built(x, y).terms["jacobians"] != first
    torch.manual_seed(5)
    target = targets.Projection(2).drawn()
    with torch.no_grad():
        jt = reference.input_jacobian(teacher, x, target, y)
        js = reference.input_jacobian(student, x, target, y)
    assert torch.allclose(first, reference.jacobian_match_loss(js, jt, normalize=False))


@pytest.mark.parametrize("term", ["activations", "kd", "dkd"])
def test_terms_of_logits(term):
    x, y, _ = images()
    built = objective(**{term: 0.5}, temperature=2.0)
    ls, lt = outputs(x)
    expected = {
        "activations": lambda: (ls - lt).square().sum(1).mean(),
        "kd": lambda: terms.knowledge_distillation_loss(ls, lt, 2.0),
        "dkd": lambda: terms.decoupled_distillation_loss(ls, lt, y, 2.0),
    }[term]()
    found = built(x, y)
    assert torch.allclose(found.terms[term], expected)
    assert torch.allclose(found.loss, F.cross_entropy(ls, y) + 0.5 * expected)


def test_relational_distillation_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchdistill.losses.mid_level", None)
    x, y, _ = images()
    with pytest.raises(FastjacError, match="--rkd needs the package torchdistill"):
        objective(rkd=1.0)(x, y)


def test_hints_train_their_convolution():
    x, y, _ = images()
    built = objective(hints=1.0, level=1)
    student, teacher = networks()
    layers = level_layer(student, 1), level_layer(teacher, 1)
    fs = reference.forward_and_jacobian(
        student, x, targets.AttentionWindow(layers[0]), y, create_graph=True
    )[1]
    with torch.no_grad():
        ft = reference.forward_and_jacobian(teacher, x, targets.AttentionWindow(layers[1]), y)[1]
    found = built(x, y)
    assert torch.allclose(found.terms["hints"], F.mse_loss(built.heads["hint"].regressor(fs), ft))
    assert "hint.regressor.weight" in gradients(found.loss, built.heads)


@pytest.mark.parametrize("jacobians", [0.0, 1.0], ids=["alone", "with Jacobians"])
def test_activations_of_other_classes_train_a_second_head(jacobians):
    x, y, _ = images()
    built = objective(
        *(7,), activations=0.5, jacobians=jacobians, target="attention-window", window=0.5
    )
    student, teacher = networks(7)
    found = built(x, y)
    embedding = torch.nn.Sequential(*list(student)[:-1])(x)
    logits = built.heads["logits"](embedding)
    with torch.no_grad():
        lt = teacher(x)
    expected = (logits - lt).square().sum(1).mean()
    assert torch.allclose(found.terms["activations"], expected)
    mine = gradients(found.terms["activations"], built)
    theirs = gradients(expected, built)
    assert "heads.logits.weight" in mine
    assert "student.conv1.weight" in mine
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, atol=1e-9 * gradient.abs().max())


def test_noise_is_drawn_for_both_networks():
    x, y, _ = images()
    built = objective(noisy_activations=1.0, noise=0.3)
    torch.manual_seed(7)
    found = built(x, y).terms["noisy_activations"]
    torch.manual_seed(7)
    ls, lt = outputs(x + 0.3 * torch.randn_like(x))
    assert torch.allclose(found, (ls - lt).square().sum(1).mean())


def test_input_noise_is_for_training():
    x, y, _ = images()
    built = objective(input_noise=0.3)
    torch.manual_seed(7)
    found = built(x, y).loss
    torch.manual_seed(7)
    assert torch.allclose(found, F.cross_entropy(outputs(x + 0.3 * torch.randn_like(x))[0], y))
    built.student.eval()
    assert torch.equal(built(x, y).loss, F.cross_entropy(built.student(x), y))
    built.student.train()


@pytest.mark.parametrize("target", ["label-logit", "cross-entropy"])
@pytest.mark.parametrize("soft", [False, True], ids=["unlabelled", "probabilities"])
def test_without_a_label_the_jacobian_is_of_the_teachers_class(soft, target):
    x, y, _ = images()
    built = objective(jacobians=1.0, target=target)
    guess = networks()[1](x).argmax(1)
    given = (
        torch.rand(6, CLASSES).double() if soft else torch.where(torch.arange(6) % 2 == 0, y, -1)
    )
    expected = guess if soft else torch.where(given < 0, guess, given)
    found = built(x, given)
    assert torch.allclose(found.terms["jacobians"], built(x, expected).terms["jacobians"])
    logits = built.student(x)
    assert torch.allclose(found.terms["ce"], terms.label_cross_entropy(logits, given))


@pytest.mark.parametrize("target", ["label-logit", "cross-entropy"])
def test_the_norm_is_of_the_class_with_most_weight(target):
    """Which needs no teacher; of an image without any label, it is of the teacher's class."""
    x, y, _ = images()
    soft = F.one_hot(y, CLASSES).double() * 0.6 + F.one_hot((y + 1) % CLASSES, CLASSES) * 0.4
    student, teacher = networks()
    alone = StudentOptions(jacobian_norm=1.0, target=target)
    for built in (
        Distillation(alone, student.train(), None, images()[2]),
        objective(jacobian_norm=1.0, kd=1.0, target=target),
    ):
        found = built(x, soft)
        assert torch.equal(found.terms["jacobian_norm"], built(x, y).terms["jacobian_norm"])
        assert torch.equal(found.terms["ce"], F.cross_entropy(found.logits, soft))
    some = torch.where(torch.arange(6) % 2 == 0, y, -1)
    filled = torch.where(some < 0, teacher(x).argmax(1), some)
    assert not torch.equal(filled, y)
    assert torch.equal(
        *(built(x, given).terms["jacobian_norm"] for given in (some, filled)),
    )


REFUSED = {
    "attention beside a logit's Jacobian": (
        {"attention": 1.0, "jacobians": 1.0},
        "--attention with --jacobians needs --target attention-window",
    ),
    "attention beside a logit's norm": (
        {"attention": 1.0, "jacobian_norm": 1.0},
        "--attention with --jacobian-norm needs --target attention-window",
    ),
    "both Jacobian terms": (
        {"jacobians": 1.0, "jacobian_norm": 1.0},
        "--jacobians and --jacobian-norm: give one of them",
    ),
    "level too high": (
        {"attention": 1.0, "level": 3},
        r"level 3: VGG has levels 1 to 2",
    ),
    "levels and a layer": ({"levels": [1], "layer": "pool1"}, "--levels and --layer"),
    "temperature": ({"temperature": 0.0}, "--temperature: expected more than 0, got 0.0"),
    "noise": ({"noise": -1.0}, "--noise: expected 0 or more, got -1.0"),
    "cached projections": (
        {"jacobians": 1.0, "target": "projection", "teacher_cache": "folder"},
        "--teacher-cache folder: --target projection draws random numbers",
    ),
    "cached mixtures": (
        {"kd": 1.0, "mixup": 1.0, "teacher_cache": "folder"},
        "--teacher-cache folder: with --mixup and --cutmix hardly an image comes twice",
    ),
    "unlabelled without a teacher": (
        {"jacobian_norm": 1.0, "unlabelled": "folder"},
        "--unlabelled: nothing can be learnt from images without labels but from a teacher; expec",
    ),
    "unlabelled mixtures": (
        {"kd": 1.0, "cutmix": 1.0, "unlabelled": "folder"},
        "--unlabelled does not go with --cutmix, which needs labels",
    ),
    "unlabelled smoothing": (
        {"kd": 1.0, "label_smoothing": 0.1, "unlabelled": "folder"},
        "--unlabelled does not go with --label-smoothing, which needs labels",
    ),
    "cached hints": ({"hints": 1.0, "teacher_cache": "folder"}, "--hints takes whole feature maps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    given, expected = REFUSED[case]
    with pytest.raises(FastjacError, match=expected):
        objective(**given)
