"""A layer's output on the way: the right one, once, as the model made it."""

import doctest

import pytest
import torch
from torch import Tensor, nn

from fastjac import features as features_module
from fastjac.errors import FastjacError
from fastjac.features import capture, check_logits, find_layer, forward_with_features


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
        self.twice = nn.Tanh()
        self.unused = nn.Tanh()
        self.pair = Pair()
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.pair(self.twice(self.twice(self.stem(x))))[0]
        return self.head(self.relu(z).mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 0, x


X = torch.linspace(0, 1, 3 * 36).view(1, 3, 6, 6)


def test_the_features_are_the_layers_output_and_carry_its_graph():
    model = Network()
    logits, features = forward_with_features(model, X, "stem")
    assert torch.equal(features, model.stem(X))
    assert torch.equal(logits, model(X))
    (got,) = torch.autograd.grad(features.sum(), model.stem[0].weight, retain_graph=True)
    (expected,) = torch.autograd.grad(model.stem(X).sum(), model.stem[0].weight)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.grad(logits.sum(), features)[0].norm() > 0


def test_no_layer_no_features():
    model = Network()
    logits, features = forward_with_features(model, X, None)
    assert features is None
    assert torch.equal(logits, model(X))


def test_several_layers_of_one_forward():
    model = Network()
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append("stem"))
    with capture(model, ["head", "stem.0", None, "stem", "stem"]) as features:
        output = model(X)
    assert calls == ["stem"]
    assert set(features) == {"head", "stem.0", "stem"}
    assert features["head"] is output  # of any shape, and the very tensor
    assert torch.equal(features["stem"], features["stem.0"].tanh())
    assert torch.autograd.grad(output.sum(), features["stem.0"])[0].norm() > 0


def test_a_models_own_hooks_come_first():
    model = Network()
    model.stem.register_forward_hook(lambda module, args, output: output * 2)
    with capture(model, ["stem"]) as features:
        model(X)
    assert torch.equal(features["stem"], model.stem[1](model.stem[0](X)) * 2)


def test_the_model_is_left_as_it_was():
    model = Network()
    forward_with_features(model, X, "stem")
    with pytest.raises(FastjacError):
        forward_with_features(model, X, "twice")
    with pytest.raises(FastjacError), capture(model, ["stem", "steam"]):
        model(X)
    with pytest.raises(ZeroDivisionError), capture(model, ["stem", "unused"]):
        raise ZeroDivisionError  # and not that no layer ran
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("twice", "layer 'twice' runs 2 times in one forward; expected once"),
        ("unused", "layer 'unused' runs 0 times in one forward; expected once"),
        ("pair", "layer 'pair' is not a feature map: it returns tuple"),
        ("steam", "unknown layer 'steam' in the model; nearest: 'stem'"),
        ("", "unknown layer '' in the model; nearest: 'stem', 'stem.0'"),
        ("zzzz", "unknown layer 'zzzz' in the model; nearest: 'stem', "),
    ],
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_errors(layer, message, context):
    with context(), pytest.raises(FastjacError, match=message):
        forward_with_features(Network(), X, layer)
    model = Network()
    with context(), pytest.raises(FastjacError, match=message), capture(model, ["stem", layer]):
        model(X)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_overwritten_features(context):
    model = InPlace()
    with context():
        with pytest.raises(FastjacError, match="output of layer 'conv' is overwritten in place"):
            forward_with_features(model, X, "conv")
        features = forward_with_features(model, X, "relu")[1]
    assert torch.equal(features, model.conv(X).relu())


def test_find_layer():
    model = Network()
    assert find_layer(model, "stem.1") is model.stem[1]
    with pytest.raises(
        FastjacError, match=r"unknown layer 'stem.7' in the student; nearest: 'stem"
    ):
        find_layer(model, "stem.7", "the student")


def test_logits_are_one_tensor():
    assert check_logits(X, Network()) is X
    with pytest.raises(FastjacError, match="Pair must return one tensor of logits; got tuple"):
        forward_with_features(Pair(), X, None)


def test_the_examples_run():
    result = doctest.testmod(features_module)
    assert result.attempted > 0
    assert result.failed == 0
