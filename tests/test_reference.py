"""The oracle against definitions spelled out for one small network, and by finite differences."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac import AttentionWindow, LabelLogit
from fastjac.reference import forward_and_jacobian, input_jacobian

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
            out = forward_and_jacobian(
                *(model, x, target, LABELS, lambda z: torch.tensor(places), batch_stats, True)
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
    place = torch.tensor([[1, 2]])
    target = AttentionWindow("relu", window=1 / 3) if target is WINDOW else target
    got = input_jacobian(model, x, target, LABELS[:1], lambda z: place, "batch")
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
    logits, _, jacobian = forward_and_jacobian(model, x, LabelLogit(), LABELS, None, batch_stats)
    after = torch.rand(3)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(3, 4, 6, 7).double(), 0.5)
    assert torch.equal(torch.rand(3), after)
    assert 0 < mask.count_nonzero() < mask.numel()
    fixed = network(drop=Times(mask))
    expected = forward_and_jacobian(fixed, x, LabelLogit(), LABELS, None, batch_stats)
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
    expected = input_jacobian(model, x, WINDOW, place=lambda z: own)
    torch.testing.assert_close(input_jacobian(model, x, WINDOW), expected, **EXACT)
    other = input_jacobian(model, x, WINDOW, place=lambda z: (own + 2) % 4)
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
