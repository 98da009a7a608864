"""Calls that a mode may not see, beyond test_what_ran.py: exact, or one clear error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from agreement import assert_agrees
from small_network import LABELS, STATISTICS, Apply, agrees, exact_or_refused, images, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastjac import FastjacError, LabelLogit, Logits, fuse, with_jacobian

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
def test_an_argument_among_several_results_is_what_it_was(batch_stats):
    def function(z: Tensor) -> Tensor:
        read_before = z.sin()
        same, _ = torch.broadcast_tensors(z, z[:1])
        assert same is z
        return read_before * same

    agrees(lambda: network(Apply(function)), batch_stats)


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


@pytest.mark.parametrize("function", [torch.cumsum, torch.add, torch.div, torch.clamp])
def test_a_result_that_is_written_elsewhere_is_an_error(function):
    model = network(Apply(lambda z: function(z, 1, out=torch.empty_like(z))))
    with pytest.raises(FastjacError, match="with out= is not supported; expected its result"):
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


def written_at(z: Tensor, index: Tensor) -> Tensor:
    z, parts = z.sin(), z.cos()
    z[:, index] = parts
    return z


@pytest.mark.parametrize(
    "function",
    [
        written_at,
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


def test_a_write_to_a_view_made_without_gradients():
    def scale(z: Tensor) -> Tensor:
        with torch.no_grad():
            z[:, 0] *= 0.5
        return z

    agrees(lambda: network(Apply(scale)))


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


# Subclasses of Tensor


class Rounded(Tensor):
    """A weight that layers read rounded, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (F.linear, torch.conv2d):
            x, weight, *rest = args
            return function(x, weight.as_subclass(Tensor).sin(), *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


class Doubles(Tensor):
    """Of which additions and rectifiers give twice as much."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out if function in (Tensor.add, F.relu) else out


def rounded() -> nn.Module:
    model = network()
    for layer in (model[0], model[5], model[8]):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Rounded))
    return model


@pytest.mark.parametrize("place", ["first", "middle"])
@pytest.mark.parametrize("kind", [Subclass, Doubles])
def test_a_subclass_inside_the_model(kind, place):
    def make() -> nn.Module:
        wrap, unwrap = (Apply(lambda z, k=k: z.as_subclass(k)) for k in (kind, Tensor))
        inner = network(
            nn.Sequential(Apply(torch.sin), wrap, Apply(lambda z: z.add(z.sin()).relu()))
        )
        if place == "first":
            return nn.Sequential(wrap, *inner, unwrap)
        return nn.Sequential(*inner, unwrap)

    agrees(make)


def test_a_parameter_of_a_subclass_that_redefines_calls():
    agrees(rounded, "batch")
    found = []
    for wrap in (lambda model: model, fuse):
        torch.manual_seed(0)
        model = rounded()
        wrap(model)(images()).square().sum().backward()
        found.append([p.grad.as_subclass(Tensor) for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


class SparseLayer(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        dense = torch.eye(4).double() + torch.eye(4).roll(1, 1)
        self.weight = nn.Parameter(getattr(dense, layout)())

    def forward(self, z: Tensor) -> Tensor:
        return (self.weight @ z.transpose(0, 1).flatten(1)).view(4, *z[:, 0].shape).transpose(0, 1)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_weight_trains(layout):
    found = []
    for strategy in ("auto", "autograd"):
        torch.manual_seed(0)
        model = network(SparseLayer(layout))
        options = {"batch_stats": "batch", "strategy": strategy}
        out = with_jacobian(model, images(), LabelLogit(), LABELS, **options)
        out.jacobian.square().sum().backward()
        found.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


# Flags, modes and transforms


def test_setting_requires_grad():
    def set_true(x: Tensor) -> Tensor:
        x.requires_grad = True
        return x.requires_grad_()

    model = network()
    found = [
        with_jacobian(m, images(), LabelLogit(), LABELS).jacobian.detach()
        for m in (model, nn.Sequential(Apply(set_true), model))
    ]
    assert torch.equal(*found)
    for off in (lambda z: z.requires_grad_(False), lambda z: setattr(z, "requires_grad", False)):
        with pytest.raises(FastjacError, match=r"requires_grad .* to False; expected .detach\(\)"):
            with_jacobian(network(Apply(off)), images(), LabelLogit(), LABELS)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "functionalize"])
def test_inside_of_a_transform_it_is_an_error(transform):
    model = network()

    def loss(x: Tensor) -> Tensor:
        return with_jacobian(model, x, LabelLogit(), LABELS).jacobian.sum()

    with pytest.raises(FastjacError, match=r"inside of a torch\.func transform"):
        getattr(torch.func, transform)(loss)(images())


def test_where_saved_tensors_have_no_hooks():
    model = network()
    expected = model(images())
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        torch.testing.assert_close(fuse(model)(images()), expected, rtol=1e-9, atol=1e-12)
        with_jacobian(model, images(), LabelLogit(), LABELS).jacobian.sum().backward()


def test_a_run_on_fake_tensors_leaves_none_behind():
    def run() -> Tensor:
        return with_jacobian(nn.Linear(4, 3), torch.rand(2, 4), Logits([0, 2])).jacobian

    with FakeTensorMode():
        run()
    assert type(run()) is Tensor


@pytest.mark.parametrize("frozen", [False, True])
def test_a_view_of_another_dtype_has_no_derivative(frozen):
    def bits(z: Tensor) -> Tensor:
        return z * z.view(torch.float32).isfinite().sum() + z.view(torch.complex128).abs().mean()

    def make() -> nn.Module:
        model = network(Apply(bits))
        model[:4].requires_grad_(not frozen)
        return model

    agrees(make)


def test_a_slice_whose_bound_is_a_tensor_that_changes():
    def function(z: Tensor) -> Tensor:
        first, out = torch.tensor(0), z.sin()
        for k in range(3):
            out[:, :, first:] = out[:, :, first:].clone() * z[:, :, first:] + k
            first += 1
        return out

    agrees(lambda: network(Apply(function)))


@STATISTICS
def test_a_norm_in_train_mode_and_then_on_what_it_has_updated(batch_stats):
    class TrainThenEval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4, momentum=0.5)

        def forward(self, z: Tensor) -> Tensor:
            y = self.norm(z)
            self.norm.eval()
            y = y.relu() + self.norm(2 * z)
            self.norm.train()
            return y.sin()

    agrees(lambda: network(TrainThenEval()), batch_stats)


def test_a_layer_of_no_features():
    """AdaptiveLogSoftmaxWithLoss makes one where its clusters shrink fast."""
    x = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0)).double()

    class Tails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 6])

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax.log_prob(x.flatten(0, 1)).view(len(x), -1)

    assert Tails().softmax.tail[1][0].weight.shape == (0, 6)
    assert_agrees(lambda: Tails().double(), x, LabelLogit(), LABELS)


@STATISTICS
def test_a_norm_of_transposed_series_is_viewed(batch_stats):
    """PyTorch's result is contiguous, whatever its input is, and models rely on that."""

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x.transpose(1, 2)).relu().view(len(x), -1))

    x = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    assert_agrees(lambda: Series().double(), x, LabelLogit(), LABELS, batch_stats=batch_stats)
    torch.testing.assert_close(
        fuse(Series().double())(x), Series().double()(x), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(2, channels)])
def test_a_norm_of_a_part_of_a_channels_last_map_is_channels_last(norm):
    """As PyTorch's is: models view it so, and dropout draws its numbers in that order."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.head = norm(4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            first, _ = x.chunk(2, 1)
            y = self.norm(first).relu().permute(0, 2, 3, 1).view(-1, 4)
            return self.head(y).view(len(x), -1, 5).mean(1)

    x = torch.rand(3, 8, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    x = x.to(memory_format=torch.channels_last)
    assert_agrees(lambda: Halves().double(), x, LabelLogit(), LABELS)
    fused, expected = fuse(Halves().double())(x), Halves().double()(x)
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-12)


def test_a_sum_has_the_layout_of_its_first_term():
    """As PyTorch's has."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x + self.norm(x.contiguous()))
            return self.head(y.permute(0, 2, 3, 1).view(-1, 4)).view(len(x), -1, 5).mean(1)

    x = torch.rand(3, 4, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    x = x.to(memory_format=torch.channels_last)
    assert_agrees(lambda: Adds().double(), x, LabelLogit(), LABELS)
    fused, expected = fuse(Adds().double())(x), Adds().double()(x)
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-12)
