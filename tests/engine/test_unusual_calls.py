"""Calls that a mode may not see, beyond test_what_ran.py: exact, or one clear error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from small_network import LABELS, STATISTICS, Apply, agrees, exact_or_refused, images, network
from torch import Tensor, nn

from fastjac import FastjacError, LabelLogit, fuse, with_jacobian

# What runs outside of PyTorch's Python functions


class WritesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.mark_dirty(z)
        return z.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Reverses(torch.autograd.Function):
    """Says that it has written in place, and has not."""

    @staticmethod
    def forward(ctx, z):
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx, g):
        return -g


class Comparison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        y = (z > 0).double()
        ctx.mark_non_differentiable(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return None


class Subclass(torch.Tensor):
    pass


def written_by_a_thread(z: Tensor) -> Tensor:
    buffer = torch.zeros_like(z)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: buffer.copy_(z.sin())).result()
    return buffer * z


def without_torch_functions(z: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        y = z.sin()
    return y * z


def saved_on_cpu(z: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return z.sin() * z


TRACED = torch.jit.trace(lambda z: z.sin() * 2, torch.rand(2, 2).double())
UNUSUAL = {
    "function in place": lambda z: WritesInPlace.apply(z.sin()) * z,
    "function that says so": lambda z: Reverses.apply(z.sin()) * z,
    "function, not differentiable": lambda z: Comparison.apply(z) * z,
    "thread": written_by_a_thread,
    "no torch functions": without_torch_functions,
    "saved on CPU": saved_on_cpu,
    "traced": lambda z: TRACED(z) * z,
    "subclass": lambda z: z.as_subclass(Subclass).sin().as_subclass(Tensor) * z,
    "vmap": lambda z: torch.func.vmap(lambda s: s.sin() * s.mean())(z) * z,
    "func.grad": lambda z: torch.func.grad(lambda w: w.sin().sum())(z) * z,
    "jacrev": lambda z: torch.func.jacrev(lambda w: w.sin().sum())(z) * z,
    "jvp": lambda z: torch.func.jvp(torch.sin, (z,), (z,))[1] * z,
    "cond": lambda z: torch.cond(z.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (z,)),
    "sparse": lambda z: z.flatten(1).to_sparse().to_dense().view_as(z) * z,
    "compiled": lambda z: torch.compile(lambda a: a.sin() * a, backend="eager")(z),
    "retained gradient": lambda z: (z.retain_grad() if z.requires_grad else None, z.sin() * z)[1],
}


@STATISTICS
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls_are_exact_or_refused(name, frozen, batch_stats):
    def make() -> nn.Module:
        model = network(Apply(UNUSUAL[name]))
        model[:4].requires_grad_(not frozen)
        return model

    exact_or_refused(make, batch_stats)


def test_a_thread_whose_autograd_nodes_have_the_same_numbers_is_not_taken_for_ours():
    """Autograd numbers the nodes of each thread from 0."""

    def twin_of(z: Tensor) -> Tensor:
        while (y := z.sin()).grad_fn._sequence_nr() < z.grad_fn._sequence_nr():
            pass
        assert y.grad_fn._sequence_nr() == z.grad_fn._sequence_nr()
        return y

    def in_a_thread(function, *arguments: object) -> object:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *arguments).result()

    model = network(Apply(lambda z: in_a_thread(twin_of, z.cos())))
    with pytest.raises(FastjacError, match="derivative fastjac has not seen"):
        in_a_thread(with_jacobian, model, images(), LabelLogit(), LABELS)


def test_a_result_that_is_written_elsewhere_is_an_error():
    model = network(Apply(lambda z: torch.cumsum(z, 1, out=torch.empty_like(z))))
    with pytest.raises(
        FastjacError, match="cumsum with out= is not supported; expected its result"
    ):
        with_jacobian(model, images(), LabelLogit(), LABELS)


@pytest.mark.parametrize("which", ["0.weight", "1.weight", "5.weight", "8.weight"])
def test_a_parameter_that_changes_before_the_backward_is_an_error(which):
    model = network()
    out = with_jacobian(model, images(), LabelLogit(), LABELS)
    with torch.no_grad():
        model.get_parameter(which).add_(0.5)
    with pytest.raises(FastjacError, match="was overwritten in place by a later operation"):
        out.jacobian.square().sum().backward()


def test_a_nested_tensor_is_an_error():
    def nested(z: Tensor) -> Tensor:
        parts = torch.nested.as_nested_tensor([z[0], z[1, :2], z[2]])
        return torch.nested.to_padded_tensor(parts.sin(), 0.0)

    model = network(Apply(nested))
    with_jacobian(model, images(), LabelLogit(), LABELS, strategy="autograd")  # as the error says
    with pytest.raises(
        FastjacError, match=r"makes a nested tensor of .* padded tensors and a mask"
    ):
        with_jacobian(model, images(), LabelLogit(), LABELS)


@pytest.mark.parametrize(
    "function",
    [
        lambda z, index: z.index_select(1, index),
        lambda z, index: z[:, index],
        lambda z, index: z.gather(1, index[:, None, None].expand_as(z)),
    ],
)
def test_an_index_that_changes_before_the_backward_is_an_error(function):
    index = torch.tensor([2, 0, 1, 3])
    model = network(Apply(lambda z: function(z, index)))
    out = with_jacobian(model, images(), LabelLogit(), LABELS)
    index.copy_(index.flip(0))
    with pytest.raises(FastjacError, match="was overwritten in place by a later operation"):
        out.jacobian.square().sum().backward()


class Remembers(nn.Module):
    """Python state that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.calls = torch.zeros(4, 1, 1).double(), 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        self.memory = 0.9 * self.memory + z.mean((0, 2, 3)).detach()[:, None, None]
        return z * z * self.memory


def test_python_state_changes_once_a_step():
    model = network(Remembers())
    agrees(lambda: network(Remembers()), "batch")
    with_jacobian(model, images(), LabelLogit(), LABELS)
    assert model[4].calls == 1


def test_forward_mode_in_a_model_is_an_error():
    def dual(z: Tensor) -> Tensor:
        with forward_ad.dual_level():
            pair = forward_ad.make_dual(z, torch.ones_like(z))
            return forward_ad.unpack_dual(pair.sin()).primal

    model = network(Apply(dual))
    with_jacobian(model, images(), LabelLogit(), LABELS, strategy="autograd")  # as the error says
    with pytest.raises(FastjacError, match="on what depends on x in forward mode"):
        with_jacobian(model, images(), LabelLogit(), LABELS)


def test_a_write_to_a_view_made_without_gradients_is_an_error():
    def scale(z: Tensor) -> Tensor:
        with torch.no_grad():
            z[:, 0] *= 0.5
        return z

    model = network(Apply(scale))
    with_jacobian(model, images(), LabelLogit(), LABELS, strategy="autograd")  # as the error says
    with pytest.raises(FastjacError, match="overwritten in place where fastjac cannot see it"):
        with_jacobian(model, images(), LabelLogit(), LABELS)


class AddsSparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.relu(torch.add(self.norm(x), other))


def test_a_sparse_addend_in_a_fused_model():
    model = AddsSparse().double()
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.eye(4, dtype=torch.float64).expand(2, 3, 4, 4).to_sparse()
    torch.testing.assert_close(fuse(model)(x, other), model(x, other), rtol=1e-12, atol=1e-12)
