"""``with_jacobian``: targets, structures, shapes, several scalars and losses of one forward, errors."""

from __future__ import annotations

import copy
import doctest
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac
from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    Logits,
    Projection,
    Scalar,
    Target,
    register_rule,
    with_jacobian,
)
from fastjac.engine.rules import Rule
from fastjac.targets import Head

EXACT = {"rtol": 1e-9, "atol": 1e-12}
LABELS = torch.tensor([0, 3, 1])


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*stem, nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)).double()


def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()


def losses(jacobian: Tensor) -> Tensor:
    """Several losses of one J."""
    weight = torch.linspace(-1, 1, jacobian.numel(), dtype=jacobian.dtype).view_as(jacobian)
    loss = fastjac.gradient_penalty(jacobian, 0.3) + fastjac.jacobian_norm_penalty(jacobian)
    loss = loss + 2 * fastjac.jacobian_cosine_loss(jacobian, weight)
    return loss + fastjac.masked_jacobian_penalty(jacobian, (weight > 0).double())


def step(model: nn.Module, x: Tensor, target: Any, y: Any, strategy: str, **options: Any) -> Any:
    model = copy.deepcopy(model)
    torch.manual_seed(5)
    out = with_jacobian(model, x, target, y, strategy=strategy, **options)
    jacobians = out.jacobian if isinstance(target, tuple) else (out.jacobian,)
    sum(losses(j) for j in jacobians).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [j.detach() for j in jacobians], gradients


def check(
    model: nn.Module, x: Tensor, target: Any, y: Any = LABELS, **options: Any
) -> list[Tensor]:
    got = step(model, x, target, y, "auto", **options)
    expected = step(model, x, target, y, "autograd", **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)  # gradients that are zero
    return got[0]


class Energy(Target):
    """Both the output and a layer's features, and no closed form."""

    layer = "4"

    def scalar(self, output: Tensor, features: Tensor, y: Any) -> Tensor:
        return output.logsumexp(1) + features.square().mean((1, 2, 3))


class Corner(Target):
    """A window of its own: the sum of cubes in a corner of a layer."""

    layer = "3"
    features_alone = True

    def scalar(self, output: Tensor, features: Tensor, y: Any) -> Tensor:
        return features[:, :, :2, :2].pow(3).sum((1, 2, 3))

    def head(self, output: Tensor, features: Tensor, y: Any) -> Head:
        z = features.detach()[:, :, :2, :2]
        start = torch.zeros(len(z), 2, dtype=torch.int64)
        return Head("features", 3 * z**2, lambda tangent: 6 * z * tangent, start, 2)


TARGETS = {
    "logit": LabelLogit(),
    "cross-entropy": Scalar(lambda output, y: F.cross_entropy(output, y, reduction="none")),
    "energy": Scalar(lambda output, y: output.logsumexp(1)),
    "columns": Scalar(lambda output, y: output[:, :2] * output[:, 2:3]),
    "a layer": Scalar(lambda z, y: z.pow(2).sum((1, 2, 3)), layer="4"),
    "all logits": Logits(),
    "some logits": Logits([4, 0]),
    "projection": Projection(3).drawn(),
    "window": AttentionWindow("3", window=0.5),
    "a target": Energy(),
    "a window of its own": Corner(),
    "several": (LabelLogit(), Logits([1]), AttentionWindow("3", window=0.5), Energy()),
}


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("name", TARGETS)
def test_targets(name, batch_stats):
    found = check(network(), images(), TARGETS[name], batch_stats=batch_stats)
    rows = {"columns": 2, "all logits": 5, "some logits": 2, "projection": 3}
    if name in rows:
        assert found[0].shape == (3, rows[name], 3, 8, 8)


def test_a_window_of_its_own_runs_on_crops():
    x = images()
    local = fastjac.input_jacobian(network(), x, Corner(), strategy="local")
    torch.testing.assert_close(local, fastjac.input_jacobian(network(), x, Corner()), **EXACT)
    assert local[:, :, 6:].count_nonzero() == 0 < local.count_nonzero()


def test_projections_estimate_the_full_squared_norm():
    model, x = network().eval(), images()
    full = fastjac.input_jacobian(model, x, Logits()).square().sum()
    torch.manual_seed(0)
    estimate = fastjac.input_jacobian(model, x, Projection(2000)).square().sum()
    assert 0.8 < estimate / full < 1.2


@dataclass
class Result:
    logits: Tensor
    features: list[Tensor]


class Returns(nn.Module):
    """``make`` of the logits, for every kind of structure."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.inner, self.make = network(), make

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Any:
        x = x * scale if shift is None else x * scale + shift
        return self.make(self.inner(x))


STRUCTURES = {
    "dict": (lambda z: {"aux": z.sin(), "logits": z}, "logits"),
    "tuple": (lambda z: (z.sin(), z), 1),
    "dataclass": (lambda z: Result(z, [z]), "logits"),
    "function": (lambda z: {"a": [z.sin(), z]}, lambda out: out["a"][1] * 2),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_output_picks_a_tensor_of_a_structure(name):
    make, output = STRUCTURES[name]
    model, x = Returns(make), images()
    check(model, x, LabelLogit(), output=output)
    out = with_jacobian(model.eval(), x, LabelLogit(), LABELS, output=output)
    assert type(out.output) is type(make(torch.zeros(1)))
    matcher = JacobianMatching(model, network(7), output=output, teacher_output=lambda z: z)
    matched = matcher(x, LABELS)
    assert matched.jacobian_loss.requires_grad
    assert type(matched.student_output) is type(out.output)
    assert matched.student_logits.shape == (3, 5)


def test_further_arguments_are_constants():
    shift = torch.full((3, 1, 8, 8), 0.1, dtype=torch.float64)
    options = {"args": (2.0,), "kwargs": {"shift": shift}}
    check(Returns(lambda z: z), images(), LabelLogit(), **options)


SHAPES = {
    "vectors": ((3, 6), lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))),
    "series": (
        (3, 4, 6),
        lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.Flatten(), nn.Linear(12, 5)),
    ),
    "embeddings": (
        (3, 4, 8),
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(32, 5),
        ),
    ),
    "volumes": (
        (3, 1, 4, 4, 4),
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.SiLU(), nn.Flatten(), nn.Linear(16, 5)
        ),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_x_of_any_shape(name):
    shape, make = SHAPES[name]
    torch.manual_seed(0)
    found = check(make().double(), torch.rand(shape).double(), LabelLogit())
    assert found[0].shape == shape


def test_a_jacobian_is_a_tensor_like_any():
    """In two losses, backward in parts, kept for a second backward, and for some parameters alone."""
    model, x = network().eval(), images()
    out = with_jacobian(model, x, LabelLogit(), LABELS)
    parameters = list(model.parameters())
    both = out.jacobian.square().sum() + 3 * losses(out.jacobian)
    options = {"retain_graph": True, "allow_unused": True}
    together = torch.autograd.grad(both, parameters, **options)
    parts = [
        torch.autograd.grad(term, parameters, **options)
        for term in (out.jacobian.square().sum(), 3 * losses(out.jacobian))
    ]
    for whole, first, second in zip(together, *parts, strict=True):
        if whole is not None:
            torch.testing.assert_close(whole, first + second, **EXACT)
    (alone,) = torch.autograd.grad(both, [model[0].weight])
    torch.testing.assert_close(alone, together[0], **EXACT)
    with pytest.raises(RuntimeError, match="second time"):  # also by a graph of its own
        torch.autograd.grad(out.jacobian.sum(), [model[0].weight])


def test_without_a_graph():
    model, x = network().eval(), images()
    expected = with_jacobian(model, x, LabelLogit(), LABELS, strategy="autograd").jacobian.detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = with_jacobian(model, x, LabelLogit(), LABELS.clone())
        assert not out.jacobian.requires_grad
        assert not out.output.requires_grad
        torch.testing.assert_close(out.jacobian.clone(), expected, **EXACT)
    model.requires_grad_(False)
    out = with_jacobian(model, x, LabelLogit(), LABELS)
    assert not out.jacobian.requires_grad
    assert not out.output.requires_grad


# An x that requires grad


def generated(model: nn.Module, target: Any, strategy: str, **options: Any) -> dict[str, Tensor]:
    """The gradients of losses of J at images that a generator has made."""
    model = copy.deepcopy(model)
    torch.manual_seed(8)
    generator = nn.Linear(7, 3 * 8 * 8).double()
    x = generator(torch.rand(3, 7).double()).view(3, 3, 8, 8).sigmoid()
    out = with_jacobian(model, x, target, LABELS, strategy=strategy, **options)
    jacobians = out.jacobian if isinstance(target, tuple) else (out.jacobian,)
    (sum(losses(j) for j in jacobians) + out.output.square().mean()).backward()
    found = {f"generator {n}": p.grad for n, p in generator.named_parameters()}
    return found | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_loss_reaches_what_made_x(name, batch_stats, frozen):
    model = network().requires_grad_(not frozen)
    options = {"batch_stats": batch_stats}
    got = generated(model, TARGETS[name], "auto", **options)
    expected = generated(model, TARGETS[name], "autograd", **options)
    assert got["generator weight"].count_nonzero()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_the_gradient_in_x_of_a_loss_of_its_jacobian():
    """Of half of the squared norm it is the Hessian times J, here in closed form."""
    x = torch.linspace(-1, 2, 12).double().view(3, 4).requires_grad_()
    out = with_jacobian(nn.Identity(), x, Scalar(lambda output, y: output.pow(3).sum(1)))
    (out.jacobian.square().sum() / 2).backward()
    torch.testing.assert_close(x.grad, 18 * x.detach() ** 3, **EXACT)


class Conditioned(nn.Module):
    """Reads its condition beside its input."""

    def __init__(self, condition: Tensor | None = None) -> None:
        super().__init__()
        self.stem, self.condition = network(), condition

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.stem(x * (self.condition if condition is None else condition))


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("strategy", ["auto", "autograd"])
@pytest.mark.parametrize("made", [False, True])
def test_x_by_another_route_is_an_error(made, strategy, batch_stats):
    x = images().requires_grad_()
    x = x * 2 if made else x
    options = {"strategy": strategy, "batch_stats": batch_stats}
    for condition in (x, x.sin()):
        with fails("depends on x, not through the model's argument.* or a detached one"):
            with_jacobian(Conditioned(condition), x, Logits(), **options)
    with fails("depends on x, not through the model's argument.* or a detached one"):
        with_jacobian(Conditioned(), x, Logits(), args=(x.sin(),), **options)
    other = images().sin().requires_grad_()
    for condition in (x.sin().detach(), other * 2):
        out = with_jacobian(Conditioned(), x, Logits(), args=(condition,), **options)
        out.jacobian.square().sum().backward(retain_graph=True)  # x's graph, which both share
    assert other.grad.count_nonzero()


ASIDE = {
    "no_grad": lambda x: torch.no_grad()(torch.mean)(x),
    "detach": lambda x: x.detach().mean(),
    "detached later": lambda x: x.mean().detach(),
    "mask": lambda x: (x > 0.5).double().mean(),
    "number": lambda x: x[0, 0, 0, 0].item(),
    "zeros_like": lambda x: torch.zeros_like(x).sum() + x.new_ones(()),
    "unused": lambda x: (x.sin(), 2)[1],
}


class Aside(Conditioned):
    """Makes of its condition what has no derivative in it."""

    def __init__(self, condition: Tensor, function: Any) -> None:
        super().__init__(condition)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) * self.function(self.condition)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("name", ASIDE)
def test_x_by_another_route_without_a_derivative(name, made):
    x = images().requires_grad_()
    given = x * 2 if made else x
    results = []
    for strategy in ("auto", "autograd"):
        model = Aside(given, ASIDE[name])
        out = with_jacobian(model, given, Logits(), strategy=strategy)
        loss = out.jacobian.square().sum() + out.output.sin().sum()
        results.append(torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_x_and_a_condition_are_parts_of_one_tensor():
    """They are outputs of one autograd node, of which x is one."""
    z = torch.cat([images(), images().cos()], 1).requires_grad_()
    results = []
    for strategy in ("auto", "autograd"):
        x, condition = (z * 2).chunk(2, 1)
        model = Conditioned()
        out = with_jacobian(model, x, Logits(), args=(condition,), strategy=strategy)
        loss = out.jacobian.square().sum() + out.output.sin().sum()
        results.append(torch.autograd.grad(loss, [z, *model.parameters()]))
        with fails("depends on x, not through the model's argument"):
            with_jacobian(model, x, Logits(), args=(x.sin() + condition,), strategy=strategy)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("strategy", ["auto", "autograd"])
def test_without_a_graph_x_gets_none(strategy):
    x = images().requires_grad_()
    with torch.no_grad():
        out = with_jacobian(network(), x, LabelLogit(), LABELS, strategy=strategy)
    assert not out.jacobian.requires_grad
    assert not out.output.requires_grad
    j = fastjac.input_jacobian(network(), x, LabelLogit(), LABELS, strategy=strategy)
    torch.testing.assert_close(j, out.jacobian, **EXACT)


# Errors


def fails(message: str) -> Any:
    return pytest.raises(FastjacError, match=message)


@pytest.mark.parametrize("strategy", ["auto", "autograd"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            Scalar(lambda z, y: z.sum()),
            r"must be \[B\] or \[B, K\] with B = 3; got \[\]; .*'none'$",
        ),
        (Scalar(lambda z, y: z[:, None, :2]), r"\[3, 1, 2\]; .flatten\(1\).sum\(1\) makes"),
        (Scalar(lambda z, y: z[:2, 0]), r"with B = 3; got \[2\]"),
        (Scalar(lambda z, y: z.argmax(1)), "scalar must be floating-point; got int64"),
        (Scalar(lambda z, y: z.detach()[:, 0]), r"does not depend on the input x \(Scalar\)"),
        ("logit", "expected a Target .* got str"),
    ],
    ids=["no batch", "a map", "another batch", "integers", "a constant", "no target"],
)
def test_bad_targets(target, message, strategy):
    with fails(message):
        with_jacobian(network(), images(), target, LABELS, strategy=strategy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"args": torch.ones(2)},
            r"args: expected a tuple .* got Tensor; of a single one, \(value,\)",
        ),
        ({"kwargs": (torch.ones(2),)}, "kwargs: expected a dict of .* got tuple$"),
        ({"output": "logits"}, r"output='logits': .* returned one tensor, \[3, .*teacher_output="),
        ({"output": 0}, "output=0: .* returned one tensor"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with fails(message):
        with_jacobian(network(), images(), LabelLogit(), LABELS, **options)


def test_a_function_in_the_place_of_a_model_is_an_error():
    with fails("expected a torch.nn.Module, got function; of a function, a Module whose forward"):
        with_jacobian(lambda x: x, images(), LabelLogit(), LABELS)


def test_a_scalar_without_columns_is_an_error():
    with fails(r"Scalar: scalar must be .* K of at least 1; got \[3, 0\]"):
        with_jacobian(network(), images(), Scalar(lambda z, y: z[:, :0]), LABELS)


def test_bad_structures_and_arguments():
    model, x = Returns(STRUCTURES["dict"][0]), images()
    with fails(
        "Returns must return one tensor, or output= must say which; got dict with 'aux', 'logits'"
    ):
        with_jacobian(model, x, LabelLogit(), LABELS)
    with fails("output='ouch': Returns returned dict"):
        with_jacobian(model, x, LabelLogit(), LABELS, output="ouch")
    with fails("args has x itself"):
        with_jacobian(model, x, LabelLogit(), LABELS, output="aux", args=(x,))


def test_a_second_derivative_is_an_error():
    model = network()
    jacobian = with_jacobian(model, images(), LabelLogit(), LABELS).jacobian
    with fails("fastjac.with_jacobian differentiates once; got .*create_graph=True"):
        torch.autograd.grad(jacobian.square().sum(), model[0].weight, create_graph=True)


# Rules


def test_a_rule_of_the_users_own():
    calls = []

    @register_rule(torch.sinc)
    @dataclass
    class Sinc(Rule):
        x: Tensor

        @classmethod
        def record(cls, site: Any, input: Tensor) -> Any:
            calls.append(input.shape)
            number = site.number(input)
            return site.run(input), cls((number,), site.keep(input)), site.receives(input, 0)

        def needs_delta(self) -> bool:
            return True

        def _derivatives(self) -> tuple[Tensor, Tensor]:
            z = torch.pi * self.x
            first = (z.cos() - z.sin() / z) / self.x
            return first, -(torch.pi**2) * torch.sinc(self.x) - 2 * first / self.x

        def vjp(self, delta: Tensor) -> list[Tensor]:
            return [delta * self._derivatives()[0]]

        def jvp(self, tangents: Any, delta: Tensor) -> Any:
            first, second = self._derivatives()
            return first * tangents[0], [second * tangents[0] * delta]

    class Middle(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.sinc(z)

    model = nn.Sequential(nn.Linear(6, 8), Middle(), nn.Linear(8, 5)).double()
    check(model, torch.rand(3, 6).double(), LabelLogit())
    assert calls == [(3, 8)]
    with fails("sinc has the rule Sinc already"):
        register_rule(torch.sinc)(Sinc)
    with fails("expected a subclass of Rule"):
        register_rule(torch.erfc)(int)
    with fails("expected the functions that the rule is for, got none"):
        register_rule()(Sinc)


MODULES = [fastjac.jacobian, fastjac.matching, fastjac.fusion, fastjac.targets, fastjac.losses]


@pytest.mark.parametrize("module", [*MODULES, fastjac.engine.rules.base], ids=lambda m: m.__name__)
def test_examples_of_docstrings_run(module, registry):
    names = {**vars(module), "fastjac": fastjac, "torch": torch}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("source", ["numpy", "shared"])
def test_memory_that_pytorch_did_not_allocate(source):
    """An input from numpy, or from a DataLoader's worker; the model writes to it."""
    x = images()
    given = torch.from_numpy(x.numpy().copy()) if source == "numpy" else x.clone().share_memory_()
    model = nn.Sequential(nn.ReLU(inplace=True), network())
    wanted = with_jacobian(model, x, LabelLogit(), LABELS).jacobian
    before = given.clone()
    torch.testing.assert_close(
        with_jacobian(model, given, LabelLogit(), LABELS).jacobian, wanted, **EXACT
    )
    assert torch.equal(given, before)
