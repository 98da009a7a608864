"""The oracle against definitions spelled out for one small network, and by finite differences."""

import copy
import doctest
import random
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import reference, with_jacobian
from fastjac.errors import FastjacError
from fastjac.reference import forward_and_jacobian, input_jacobian
from fastjac.targets import AttentionWindow, LabelLogit, Logits, Projection, Scalar, Target

EXACT = {"rtol": 1e-11, "atol": 1e-13}
WINDOW = AttentionWindow("relu", window=1 / 3)
TARGETS = pytest.mark.parametrize("target", [WINDOW, LabelLogit()], ids=["window", "logit"])
LABELS = torch.tensor([2, 0, 1])


def network(**replaced: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3, padding=1),
        norm=nn.BatchNorm2d(4, eps=1e-2),
        relu=nn.ReLU(),
        drop=nn.Identity(),
        mean=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        head=nn.Linear(16, 3),
    )
    model = nn.Sequential(OrderedDict(layers, **replaced)).double()
    for p in model.norm.parameters():
        if not nn.parameter.is_lazy(p):
            nn.init.uniform_(p, 0.5, 1.5)
    return model


def images(batch: int = 3) -> Tensor:
    make = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, 6, 7, generator=make, dtype=torch.float64)


def window_phi(z: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """phi of DESIGN's definition: the mean of Z^2 over channels and a 2 x 2 window."""
    return torch.stack(
        [z[i, :, r : r + 2, c : c + 2].square().mean() for i, (r, c) in enumerate(places)]
    )


def by_hand(model: nn.Sequential, x: Tensor, target, places, frozen: bool):
    """Logits, features and J of conv, BatchNorm, ReLU, pool, linear, from the equations alone."""
    leaf = x.clone().requires_grad_()

    def logits_of(z: Tensor) -> Tensor:
        rows, cols = ((slice(0, 3), slice(3, 6)), (slice(0, 4), slice(3, 7)))  # 7 columns overlap
        pooled = [z[:, :, r, c].mean((2, 3)) for r in rows for c in cols]
        return torch.stack(pooled, 2).flatten(1) @ model.head.weight.T + model.head.bias

    def features_of(given: Tensor, source: Tensor) -> Tensor:
        """With the statistics of ``source`` as functions of the parameters."""
        u, v = (F.conv2d(t, model.conv.weight, model.conv.bias, padding=1) for t in (given, source))
        count = v.numel() / v.shape[1]
        mean = v.sum((0, 2, 3), keepdim=True) / count
        var = (v - mean).square().sum((0, 2, 3), keepdim=True) / count
        unit = (u - mean) / (var + model.norm.eps).sqrt()
        z = unit * model.norm.weight[:, None, None] + model.norm.bias[:, None, None]
        return torch.where(z > 0, z, 0.0)

    z = features_of(leaf, x if frozen else leaf)
    if isinstance(target, LabelLogit):
        phi = logits_of(z)[torch.arange(len(x)), LABELS]
    else:
        phi = window_phi(z, places)
    (jacobian,) = torch.autograd.grad(phi.sum(), leaf, create_graph=True)
    plain = features_of(x, x)
    return logits_of(plain), plain, jacobian


def loss_of(logits: Tensor, features: Tensor, jacobian: Tensor) -> Tensor:
    """Something of all three, nonlinear in each."""
    weight = torch.linspace(-1, 1, jacobian.numel(), dtype=torch.float64).view_as(jacobian)
    jacobian = jacobian / jacobian.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return logits.square().mean() + features.pow(3).mean() + (jacobian - weight).square().sum()


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@TARGETS
def test_train_mode_against_the_equations(target, batch_stats):
    model, x, places = network(), images(), [(0, 0), (4, 5), (2, 3)]
    results = []
    for way in ("ours", "by hand"):
        model.zero_grad()
        if way == "ours":
            given = target.at(torch.tensor(places)) if target is WINDOW else target
            out = forward_and_jacobian(
                model, x, given, LABELS, batch_stats=batch_stats, create_graph=True
            )
            features = model.relu(model.norm(model.conv(x))) if out[1] is None else out[1]
            out = (out[0], features, out[2])
        else:
            out = by_hand(model, x, target, places, batch_stats == "frozen")
        loss_of(*out).backward()
        results.append(([t.detach() for t in out], [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, **EXACT)


def test_frozen_and_batch_statistics_differ():
    j = {s: input_jacobian(network(), images(), WINDOW, batch_stats=s) for s in ("frozen", "batch")}
    assert (j["frozen"] - j["batch"]).norm() > 1e-3 * j["batch"].norm()
    j = {
        s: input_jacobian(network().eval(), images(), WINDOW, batch_stats=s)
        for s in ("frozen", "batch")
    }
    torch.testing.assert_close(j["frozen"], j["batch"], **EXACT)


@TARGETS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_j_by_finite_differences(target, training):
    """Of the sum of phi, with batch statistics that move along."""
    model, x, step = network(relu=nn.Tanh()).train(training), images(1), 1e-5
    target = WINDOW.at(torch.tensor([[1, 2]])) if target is WINDOW else target
    got = input_jacobian(model, x, target, LABELS[:1], batch_stats="batch")
    moves = step * torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)

    def phi(x: Tensor) -> Tensor:
        z = model.relu(model.norm(model.conv(x)))
        logits = model.head(model.flat(model.mean(z)))
        return logits[0, 2] if isinstance(target, LabelLogit) else window_phi(z, [(1, 2)])[0]

    with torch.no_grad():
        expected = torch.stack([(phi(x + m) - phi(x - m)) / (2 * step) for m in moves])
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@TARGETS
def test_running_statistics_are_updated_once(target, batch_stats, momentum):
    norm = nn.BatchNorm2d(4, momentum=momentum)
    ours, plain = network(norm=norm), network(norm=copy.deepcopy(norm))
    for count in (1, 2):
        forward_and_jacobian(ours, images(), target, LABELS, batch_stats=batch_stats)
        plain(images())
        assert ours.norm.num_batches_tracked == count
        torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), **EXACT)


def test_in_eval_mode_nothing_is_updated():
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    input_jacobian(model, images(), WINDOW)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_dropout_draws_one_mask(batch_stats):
    """The network with its mask as a constant, and as many random numbers as one forward takes."""
    model, x = network(drop=nn.Dropout(0.5)), images()
    torch.manual_seed(5)
    logits, _, jacobian = forward_and_jacobian(
        model, x, LabelLogit(), LABELS, batch_stats=batch_stats
    )
    after = torch.rand(3)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(3, 4, 6, 7).double(), 0.5)
    assert torch.equal(torch.rand(3), after)
    assert 0 < mask.count_nonzero() < mask.numel()
    fixed = network(drop=Times(mask))
    expected = forward_and_jacobian(fixed, x, LabelLogit(), LABELS, batch_stats=batch_stats)
    torch.testing.assert_close((logits, jacobian), (expected[0], expected[2]), **EXACT)


class Times(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@TARGETS
def test_what_carries_a_graph(target):
    model, x = network(), images()
    for create_graph in (False, True):
        logits, features, jacobian = forward_and_jacobian(
            model, x, target, LABELS, create_graph=create_graph
        )
        assert logits.requires_grad
        assert jacobian.requires_grad == create_graph
        assert (features is None) == isinstance(target, LabelLogit)
    with torch.no_grad():
        logits, features, jacobian = forward_and_jacobian(model, x, target, LABELS)
    assert not logits.requires_grad
    assert not jacobian.requires_grad
    assert jacobian.shape == x.shape
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad


def test_the_place_is_the_features_own_argmax_unless_given():
    model, x = network().eval(), images()
    own = WINDOW.position(model.relu(model.norm(model.conv(x))))
    expected = input_jacobian(model, x, WINDOW.at(own))
    torch.testing.assert_close(input_jacobian(model, x, WINDOW), expected, **EXACT)
    other = input_jacobian(model, x, WINDOW.at((own + 2) % 4))
    assert (other - expected).norm() > 0.1 * expected.norm()


def test_a_spectral_norm_gives_both_runs_one_weight():
    model = network()
    nn.utils.parametrizations.spectral_norm(model.conv)
    plain = copy.deepcopy(model)
    jacobian = input_jacobian(model, images(), WINDOW)
    plain(images())  # the iteration of one forward
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), **EXACT)
    fixed = network()
    fixed.conv.weight.data.copy_(plain.eval().conv.weight.detach())
    torch.testing.assert_close(jacobian, input_jacobian(fixed, images(), WINDOW), **EXACT)


# Any scalar, several of them, any structure


def wrapped(model: nn.Module, wrap) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, *args, **kwargs):
            return wrap(self.model, x, *args, **kwargs)

    return Wrapped()


def scalar_rows(model, x: Tensor, columns, **kwargs) -> Tensor:
    """J of columns of the logits, one by one."""
    phis = [Scalar(lambda z, y, k=k: z[:, k] ** 2) for k in columns]
    return torch.stack([input_jacobian(model, x, phi, **kwargs) for phi in phis], 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_rows_of_several_scalars(training):
    x, model = images(), network(relu=nn.Tanh()).train(training)
    target = Scalar(lambda logits, y: logits[:, [2, 0]] ** 2)
    expected = scalar_rows(model, x, (2, 0))
    assert expected.shape == (3, 2, 3, 6, 7)
    torch.testing.assert_close(input_jacobian(model, x, target), expected, **EXACT)
    got = forward_and_jacobian(model, x, target, create_graph=True)[2]
    torch.testing.assert_close(got.detach(), expected, **EXACT)
    grads = torch.autograd.grad(got.square().sum(), model.conv.weight)
    again = [
        forward_and_jacobian(model, x, Scalar(lambda z, y, k=k: z[:, k] ** 2), create_graph=True)[2]
        for k in (2, 0)
    ]
    expected = torch.autograd.grad(sum(j.square().sum() for j in again), model.conv.weight)
    torch.testing.assert_close(grads, expected, **EXACT)
    nothing = input_jacobian(model, x, Scalar(lambda logits, y: logits[:, :0]))
    assert nothing.shape == (3, 0, 3, 6, 7)


@pytest.mark.parametrize("create_graph", [True, False])
def test_several_targets_of_one_forward(create_graph):
    model, x, runs = network().eval(), images(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    targets = (WINDOW, LabelLogit(), Logits([1]), Scalar(lambda z, y: z.sum((1, 2, 3)), "norm"))
    logits, features, jacobians = forward_and_jacobian(
        model, x, targets, LABELS, create_graph=create_graph
    )
    assert len(runs) == 1
    assert [None if z is None else z.shape[1:] for z in features] == [
        *((4, 6, 7), None, None, (4, 6, 7))
    ]
    for target, z, j in zip(targets, features, jacobians, strict=True):
        one = forward_and_jacobian(model, x, target, LABELS)
        torch.testing.assert_close((logits, z, j), one, **EXACT)
    alone = input_jacobian(model, x, (WINDOW,))
    assert isinstance(alone, tuple)
    torch.testing.assert_close(alone[0], jacobians[0].detach(), **EXACT)


def test_projections_of_two_networks_share_their_rows():
    model, x = network().eval(), images()
    target = Projection(2, torch.Generator().manual_seed(0)).drawn()
    rows = target.rows(torch.empty(3, 3).double())
    full = input_jacobian(model, x, Logits())
    expected = torch.einsum("bnk,bkchw->bnchw", rows, full)
    torch.testing.assert_close(input_jacobian(model, x, target), expected, **EXACT)


@dataclass(frozen=True)
class Output:
    logits: Tensor
    extra: dict


STRUCTURES = {
    "dict": (lambda z: {"logits": z, "n": 3}, lambda out: out["logits"]),
    "tuple": (lambda z: (None, [z]), lambda out: out[1][0]),
    "dataclass": (lambda z: Output(z, {"twice": 2 * z}), lambda out: out.logits),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "select"), STRUCTURES.values(), ids=STRUCTURES)
def test_outputs_of_any_structure(make, select, training):
    plain, x = network().train(training), images()
    model = wrapped(plain, lambda model, x: make(model(x)))
    expected = forward_and_jacobian(plain, x, LabelLogit(), LABELS)
    out, _, jacobian = forward_and_jacobian(model, x, LabelLogit(), LABELS, select=select)
    assert type(out) is type(make(torch.zeros(1)))
    assert select(out).requires_grad
    torch.testing.assert_close((select(out), jacobian), (expected[0], expected[2]), **EXACT)
    with torch.no_grad():
        out, _, _ = forward_and_jacobian(model, x, LabelLogit(), LABELS, select=select)
    assert type(out) is type(make(torch.zeros(1)))
    assert not select(out).requires_grad
    assert not (isinstance(out, Output) and out.extra["twice"].requires_grad)
    with pytest.raises(FastjacError, match=r"the model gave \w+: name its logits with output="):
        input_jacobian(model, x, LabelLogit(), LABELS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_further_arguments(training):
    def wrap(model: nn.Module, x: Tensor, shift: Tensor, *, scale: Tensor) -> Tensor:
        logits = model(x) * scale.clone() + shift
        scale.mul_(5)  # the second run must not see it
        return logits

    plain, x = network().train(training), images()
    shift, scale = torch.ones(3).double(), torch.tensor(2.0).double()
    expected = 2 * input_jacobian(plain, x, Logits())
    got = forward_and_jacobian(
        wrapped(plain, wrap), x, Logits(), args=(shift,), kwargs={"scale": scale}
    )
    torch.testing.assert_close(got[2], expected, **EXACT)
    torch.testing.assert_close(got[0], 2 * plain(x) + 1, **EXACT)
    assert scale == 10  # one run's worth


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_input_changed_in_place(training):
    def in_place(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.mul_(2).sub_(1))

    plain, x = network().train(training), images()
    before = x.clone()
    other = wrapped(copy.deepcopy(plain), lambda model, x: model(2 * x - 1))
    model = wrapped(plain, in_place)
    for create_graph in (True, False):
        got = forward_and_jacobian(model, x, Logits(), create_graph=create_graph)
        expected = forward_and_jacobian(other, x, Logits(), create_graph=create_graph)
        torch.testing.assert_close(got, expected, **EXACT)
    assert torch.equal(x, before)


# The second run repeats the first


@pytest.mark.parametrize("name", ["torch", "random", "numpy"])
def test_random_numbers_of_any_generator(name):
    """A coin decides which layers run; the numbers drawn after it are those after one forward."""
    draw = {
        "torch": lambda: torch.rand(()).item(),
        "random": random.random,
        "numpy": np.random.rand,
    }[name]
    seed = {"torch": torch.manual_seed, "random": random.seed, "numpy": np.random.seed}[name]
    drawn = []

    def drop(model: nn.Module, x: Tensor) -> Tensor:
        drawn.append(draw())
        return model(x) * drawn[-1]

    plain, x = network(), images()
    seed(0)
    first, second = draw(), draw()
    seed(0)
    logits, _, jacobian = forward_and_jacobian(wrapped(plain, drop), x, Logits())
    assert drawn == [first, first]
    assert draw() == second
    torch.testing.assert_close(jacobian, first * input_jacobian(plain, x, Logits()), **EXACT)
    torch.testing.assert_close(logits, first * plain(x), **EXACT)


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)], ids=str)
def test_a_second_run_that_differs_is_an_error(counts):
    left = list(counts)

    def some_norms(norm: nn.Module, x: Tensor) -> Tensor:
        for _ in range(left.pop(0)):
            x = norm(x)
        return x.mean((2, 3))

    model = wrapped(nn.BatchNorm2d(3).double(), some_norms)
    with pytest.raises(FastjacError, match=r"the second run took other batch norms than the first"):
        forward_and_jacobian(model, images(), Logits())


def test_batch_norm_as_a_function():
    def functional(which: str):
        def norm(x: Tensor) -> Tensor:
            if which == "F":
                return F.batch_norm(x, None, None, training=True, eps=1e-2)
            return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-2, False)

        return wrapped(nn.Identity(), lambda _, x: norm(x))

    expected = network(norm=nn.BatchNorm2d(4, eps=1e-2, affine=False))
    expected = input_jacobian(expected, images(), WINDOW)
    for which in ("F", "torch"):
        got = input_jacobian(network(norm=functional(which)), images(), WINDOW)
        torch.testing.assert_close(got, expected, **EXACT)


def test_batch_statistics_that_are_not_seen_are_an_error():
    scripted = torch.jit.script(network())
    with pytest.raises(FastjacError, match=r"batch statistics of a BatchNorm .* were not seen"):
        input_jacobian(scripted, images(), LabelLogit(), LABELS)
    for training, batch_stats in ((True, "batch"), (False, "frozen")):
        plain = network().train(training)
        given = (images(), LabelLogit(), LABELS)
        got = input_jacobian(torch.jit.script(plain), *given, batch_stats=batch_stats)
        expected = input_jacobian(plain, *given, batch_stats="batch")
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers():
    def first_run(norm: nn.Module) -> tuple[Tensor, Tensor]:
        model = network(norm=norm)
        return input_jacobian(model, images(), WINDOW), model.norm.running_mean

    lazy = first_run(nn.LazyBatchNorm2d(affine=False))
    plain = first_run(nn.BatchNorm2d(4, affine=False))
    torch.testing.assert_close(lazy, plain, **EXACT)


def test_running_statistics_are_not_replaced_by_copies():
    model = network()
    before = model.norm.running_mean
    input_jacobian(model, images(), WINDOW)
    assert model.norm.running_mean is before


# What has no second derivative, and what has no derivative


class Attention(nn.Module):
    """Softmax attention over the rows of an image, by the fused operator or spelled out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head, self.fused = nn.Linear(21, 48), nn.Linear(16, 3), fused

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(x.transpose(1, 2).flatten(2)).unflatten(2, (3, 2, 8))
        q, k, v = tokens.permute(2, 0, 3, 1, 4)
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(2, 3) / 8**0.5
            later = torch.ones_like(scores[0, 0]).triu(1).bool()
            z = scores.masked_fill(later, -torch.inf).softmax(3) @ v
        return self.head(z.transpose(1, 2).flatten(2).mean(1).square())


def test_attention():
    x, results = images(), []
    for fused in (True, False):
        model = Attention(fused).double()
        logits, _, jacobian = forward_and_jacobian(
            model, x, LabelLogit(), LABELS, create_graph=True
        )
        (logits.square().sum() + jacobian.pow(3).sum()).backward()
        plain = input_jacobian(model, x, LabelLogit(), LABELS)
        results.append([logits, jacobian, plain, *(p.grad for p in model.parameters())])
    assert results[1][3].norm() > 0
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize(
    "function",
    [
        lambda logits, y: logits.detach().sum(1),
        lambda logits, y: torch.ones(3, 2, requires_grad=True) * 2,
        lambda logits, y: logits.argmax(1).double(),
    ],
    ids=["detached", "of something else", "of integers"],
)
def test_a_target_that_does_not_depend_on_x(function):
    for training in (True, False):
        with pytest.raises(
            FastjacError,
            match=r"^the target does not depend on the input x \(Scalar\): no gradient",
        ):
            input_jacobian(network().train(training), images(), Scalar(function))


def test_bad_targets():
    class Sum(Target):
        def scalar(self, output, features, y):
            return output.sum()

    model, x = network(), images()
    with pytest.raises(
        FastjacError, match=r"^Sum: scalar must be \[B\] or \[B, K\] with B = 3; got \[\]; "
    ):
        input_jacobian(model, x, Sum())
    with pytest.raises(FastjacError, match=r"^target: expected a Target .* got str$"):
        input_jacobian(model, x, "logits")
    with pytest.raises(
        FastjacError,
        match=r"^layer 'head' is not a feature map: expected \[B, C, h, w\], got \[3, 3\]$",
    ):
        input_jacobian(model, x, AttentionWindow("head"))
    with pytest.raises(FastjacError, match=r"^unknown layer 'rely' in the model; nearest: 'relu'"):
        input_jacobian(model, x, AttentionWindow("rely"))


class Checkpointed(nn.BatchNorm2d):
    """Runs again in a backward, where no statistics are replayed."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_frozen_statistics_in_a_checkpoint_are_an_error():
    x = images()
    with pytest.raises(
        FastjacError, match=r"torch.utils.checkpoint .* expected strategy='auto', or"
    ):
        forward_and_jacobian(network(norm=Checkpointed(4).double()), x, Logits(), create_graph=True)
    for options in ({"batch_stats": "batch"}, {"strategy": "auto"}):
        model = network(norm=Checkpointed(4).double())
        j = with_jacobian(model, x, Logits(), **{"strategy": "autograd"} | options).jacobian
        j.square().sum().backward()
        assert model.conv.weight.grad.count_nonzero()


@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 5), (4, 2, 3, 3, 2)], ids=str)
def test_inputs_of_any_dimension(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    target = Scalar(lambda z, y: (z**3).flatten(1).sum(1) * y)
    y = torch.arange(4).double()
    got = input_jacobian(nn.Tanh(), x, target, y)
    scale = y.view(-1, *[1] * (x.dim() - 1))
    torch.testing.assert_close(got, scale * 3 * x.tanh() ** 2 * (1 - x.tanh() ** 2), **EXACT)


def test_the_examples_run():
    result = doctest.testmod(reference)
    assert result.attempted > 0
    assert result.failed == 0
