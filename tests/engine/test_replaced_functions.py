"""Functions of PyTorch's that a user has replaced: the model's calls count as they ran, once each."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from small_network import LABELS, SIDE, Apply, agrees, images, network
from torch import Tensor, nn

from fastjac import AttentionWindow, LabelLogit, fuse, with_jacobian

MIDDLES = {
    "linear": lambda z: F.linear(z.flatten(1), WEIGHT)[:, :, None, None] * z,
    "pad": lambda z: F.pad(z, (1, 0, 1, 0))[..., :-1, 1:] * z,
    "max_pool2d": lambda z: F.max_pool2d(z.sin(), 3, 1, 1) * z,
    "avg_pool2d": lambda z: F.avg_pool2d(z.sin(), 3, 1, 1) * z,
    "softplus": lambda z: F.mish(z) * F.softplus(z),
    "batch_norm": lambda z: F.batch_norm(z, None, None, training=True) * z,
    "relu": lambda z: F.relu(z) * z,
    "leaky_relu": lambda z: F.leaky_relu(z) * z,
    "softmax": lambda z: F.softmax(z, 1) * z,
    "layer_norm": lambda z: F.layer_norm(z, (4, 4)) * z,
    "group_norm": lambda z: F.group_norm(z, 2) * z,
    "dropout": lambda z: F.dropout(z, 0.3) * z,
    "scaled_dot_product_attention": lambda z: F.scaled_dot_product_attention(z, z, z) * z,
    "normalize": lambda z: F.normalize(z) * z,
}
WEIGHT = torch.linspace(-1, 1, 256).double().view(4, 64)


@pytest.fixture(params=["function", "partial"])
def replace(request, monkeypatch):
    """Puts in a function's place one that calls it and changes its result."""

    def put(name: str) -> None:
        plain = getattr(F, name)

        def replaced(inner, *args, **kwargs):
            return inner(*args, **kwargs).sin() * 2

        put = functools.partial(replaced, plain)
        if request.param == "function":
            put = functools.wraps(plain)(lambda *args, **kwargs: replaced(plain, *args, **kwargs))
        monkeypatch.setattr(F, name, put)

    return put


@pytest.mark.parametrize("name", MIDDLES)
def test_a_function_of_pytorchs_that_is_replaced(name, replace):
    plain = network(Apply(MIDDLES[name]))
    state = plain.state_dict()
    replace(name)
    agrees(lambda: network(Apply(MIDDLES[name])))

    def output(wrap) -> Tensor:
        model = network(Apply(MIDDLES[name]))
        model.load_state_dict(state)
        torch.manual_seed(3)
        return wrap(model)

    expected = output(lambda model: model(images()))
    found = output(lambda model: with_jacobian(model, images(), LabelLogit(), LABELS).output)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    fused = output(lambda model: fuse(model)(images()))
    torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["pad", "max_pool2d", "avg_pool2d", "relu"])
def test_the_sweeps_on_crops_do_not_run_a_replacement(name, replace):
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * (SIDE // 4) ** 2, 5)),
    ).double()
    replace(name)
    target = AttentionWindow("2", window=0.3)
    found = [
        with_jacobian(model, images(), target, strategy=strategy).jacobian
        for strategy in ("local", "autograd")
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_rules_are_of_pytorchs_functions_though_fastjac_was_imported_after():
    """In a process that replaces F.softmax first: its rule is not the replacement's."""
    code = """
import torch, torch.nn.functional as F
plain = F.softmax
F.softmax = lambda *args, **kwargs: plain(*args, **kwargs) ** 2
from fastjac import LabelLogit, with_jacobian

class Model(torch.nn.Module):
    def forward(self, x):
        return F.softmax(x, 1)

x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
for strategy in ("auto", "autograd"):
    out = with_jacobian(Model(), x, LabelLogit(), torch.tensor([0, 1, 2]), strategy=strategy)
    torch.testing.assert_close(out.output, plain(x, 1) ** 2)
    print(out.jacobian.norm().item())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, theirs = map(float, run.stdout.split())
    assert ours == pytest.approx(theirs, rel=1e-10)
