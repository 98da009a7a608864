"""What a model's Python does at each step is what is differentiated; what cannot be seen is an error."""

from __future__ import annotations

import copy
import functools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_exact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import AttentionWindow, FastjacError, JacobianMatching, LabelLogit, fuse, with_jacobian

EXACT = {"rtol": 1e-9, "atol": 1e-12}
COINS = {
    "random": random.random,
    "numpy": np.random.rand,
    "torch": lambda: torch.rand(()).item(),
}


def seed(n: int) -> None:
    random.seed(n)
    np.random.seed(n)  # noqa: NPY002  what a model would draw from
    torch.manual_seed(n)


def network(middle: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    head = (nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(*stem, nn.Tanh() if middle is None else middle, *head).double()


def batch() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(3)
    return torch.rand(3, 3, 8, 8, generator=make, dtype=torch.float64), torch.tensor([0, 3, 1])


def gradients(student: nn.Module, strategy: str, n: int = 0, **options) -> tuple:
    """Logits, loss and gradients of a step whose generators start at ``n``; buffers as they were."""
    buffers = {k: b.clone() for k, b in student.named_buffers()}
    x, y = batch()
    seed(n)
    out = with_jacobian(
        student, x, LabelLogit(), y, strategy=strategy, batch_stats="batch", **options
    )
    loss = out.jacobian.square().sum() + F.cross_entropy(out.output, y)
    parameters = [p for p in student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for k, b in student.named_buffers():
        b.copy_(buffers[k])
    zeros = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]
    return out.output.detach(), loss.detach(), zeros


def assert_steps_agree(student: nn.Module, steps: int = 1, change=lambda n: None) -> None:
    for n in range(steps):
        change(n)
        got, expected = (gradients(student, s, n) for s in ("auto", "autograd"))
        torch.testing.assert_close(got, expected, **EXACT)


class Skips(nn.Module):
    """Blocks that are left out at random; ``rate`` and ``active`` change between steps."""

    def __init__(self, coin) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.coin, self.rate, self.active = coin, 0.5, [0, 1, 2, 3]

    def forward(self, z: Tensor) -> Tensor:
        for i in self.active:
            if self.coin() < self.rate:
                z = z + F.relu(self.norms[i](self.blocks[i](z))) * self.rate
        return z


@pytest.mark.parametrize("coin", COINS)
def test_random_depth(coin):
    assert_steps_agree(network(Skips(COINS[coin])), steps=8)


def test_attributes_that_change_between_steps():
    skips = Skips(lambda: 0.1)
    student = network(skips)

    def change(n: int) -> None:
        skips.rate, skips.active = 0.2 + 0.3 * n, [0, 1, 2, 3][n:]

    assert_steps_agree(student, 3, change)


@pytest.mark.parametrize("coin", COINS)
def test_a_fused_network_runs_its_python(coin):
    student = network(Skips(COINS[coin]))
    x, _ = batch()
    for n in range(6):
        results = []
        for model in (fuse(copy.deepcopy(student)), copy.deepcopy(student)):
            seed(n)
            logits = model(x)
            weight = next(model.parameters())
            results.append((logits.detach(), torch.autograd.grad(logits.sum(), weight)))
        torch.testing.assert_close(*results, **EXACT)


def low_rank(layer: nn.Module, rank: int = 2) -> nn.Module:
    down, up = nn.Conv2d(4, rank, 1, bias=False), nn.Conv2d(rank, 4, 3, bias=False)
    adapter = nn.Sequential(down, up).double()
    original = layer.forward
    layer.forward = lambda z: original(z) + adapter(z)
    layer.adapter = adapter
    return layer


def test_a_forward_replaced_on_a_layer():
    student = network()
    student.requires_grad_(False)
    low_rank(student[5])
    assert all(g.norm() > 0 for g in gradients(student, "auto")[2])
    assert_steps_agree(student)


@pytest.mark.parametrize("how", ["wrapper", "partial"])
def test_a_forward_replaced_on_the_model(how):
    student = network()
    original = student.forward

    def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
        return factor * original(x.clamp(0.1, 0.9))

    student.forward = scaled if how == "wrapper" else functools.partial(scaled, factor=3.0)
    assert_steps_agree(student)
    x, y = batch()
    logits = JacobianMatching(student, network(seed=7))(x, y).student_logits
    assert_exact_value(logits, copy.deepcopy(student)(x))


def assert_exact_value(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.detach(), expected.detach(), **EXACT)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 2 * z

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def in_a_thread(z: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.sin, z).result()


@torch.jit.script
def scripted(z: Tensor) -> Tensor:
    return z.sin() * 2


HIDDEN = {
    "thread": in_a_thread,
    "script": lambda z: scripted(z),
    "reentrant checkpoint": lambda z: checkpoint(torch.sin, z, use_reentrant=True),
    "vmap": lambda z: torch.func.vmap(torch.sin)(z),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "in a frozen part"])
@pytest.mark.parametrize("first", [False, True], ids=["inside", "before any parameter"])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_no_mode_sees_is_an_error(name, first, frozen):
    hidden = Apply(HIDDEN[name])
    student = nn.Sequential(hidden, network()) if first else network(hidden)
    if frozen:
        student.requires_grad_(False)
        next(reversed(list(student.modules()))).requires_grad_()
    with pytest.raises(FastjacError, match="derivative fastjac has not seen"):
        gradients(student, "auto")


@pytest.mark.parametrize("name", HIDDEN)
def test_so_it_is_behind_a_pool_of_x(name):
    student = nn.Sequential(nn.MaxPool2d(1), Apply(HIDDEN[name]), network())
    with pytest.raises(FastjacError, match="derivative fastjac has not seen"):
        gradients(student, "auto")


@pytest.mark.parametrize("name", HIDDEN)
def test_behind_the_window_and_in_the_teacher_it_is_as_it_is(name):
    x, y = batch()
    hidden = network(Apply(HIDDEN[name]))
    assert_exact(hidden, network(seed=7), x, y, AttentionWindow("3", window=0.3))
    if name != "reentrant checkpoint":  # which autograd.grad does not take either
        assert_exact(network(seed=7), hidden, x, y, LabelLogit())


def test_a_custom_function_behind_a_norm_of_a_fused_network():
    student = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), Apply(Double.apply)
    ).double()
    x, _ = batch()
    results = []
    for model in (fuse(copy.deepcopy(student)), copy.deepcopy(student)):
        y = model(x)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        results.append((y.detach(), grads))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def constants(z: Tensor) -> Tensor:
    with torch.no_grad():
        gate = z.sigmoid()
    with torch.set_grad_enabled(False):
        shift = z.mean()
    held = z.detach()
    return z * gate + shift + held.sin() * z


def integers(z: Tensor) -> Tensor:
    return z * (z > z.mean()) + z.argmax(1, keepdim=True) * z + z.round().long().sum() * z


def branches(z: Tensor) -> Tensor:
    if z.sum() > 0 and z.max().item() > -1e9 and bool((z == z).all()):
        return z.tanh()
    return z


@pytest.mark.parametrize("function", [constants, integers, branches])
def test_constants_and_control_flow(function):
    assert_steps_agree(network(Apply(function)))


class Nested(nn.Module):
    """Modules that return None, a dict and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.twice = Apply(lambda z: None), Apply(lambda z: {"a": (z, 2 * z)})

    def forward(self, z: Tensor) -> Tensor:
        bias = self.nothing(z)
        first, second = self.twice(z)["a"]
        return first * second.sin() if bias is None else bias


def test_nested_values():
    assert_steps_agree(network(Nested()))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "a compiled layer": lambda m: nn.Sequential(torch.compile(m[:4], backend="eager"), m[4:]),
    "fuse": fuse,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks(wrapper):
    student = WRAPPERS[wrapper](network())
    x, y = batch()
    for n, p in enumerate(student.parameters()):
        p.requires_grad_(n != 3)
    assert_steps_agree(student)
    assert_exact(network(), WRAPPERS[wrapper](network(seed=7)), x, y, LabelLogit())


def test_a_scripted_teacher_and_a_scripted_student():
    x, y = batch()
    script = torch.jit.script(network(seed=7).eval())
    outs = [JacobianMatching(network(), t)(x, y) for t in (script, network(seed=7))]
    torch.testing.assert_close(outs[0].jacobian_loss, outs[1].jacobian_loss, **EXACT)
    with pytest.raises(FastjacError, match="derivative fastjac has not seen"):
        with_jacobian(torch.jit.script(network().eval()), x, LabelLogit(), y)


def test_a_hook_on_a_tensor_sees_what_it_sees_in_pytorch():
    """Once where J is taken, once in the backward, and the same cotangents."""
    seen: dict[str, list[Tensor]] = {}
    for strategy in ("auto", "autograd"):
        calls = seen.setdefault(strategy, [])

        def logged(z: Tensor, calls=calls) -> Tensor:
            out = z.sin()
            out.register_hook(lambda g: calls.append(g.detach().clone()))
            return out

        gradients(network(Apply(logged)), strategy)
    assert len(seen["auto"]) == len(seen["autograd"]) == 2
    torch.testing.assert_close(seen["auto"], seen["autograd"], **EXACT)


@pytest.mark.parametrize("target", [LabelLogit(), AttentionWindow("4", window=0.5)], ids=str)
def test_a_hook_that_replaces_a_tensors_gradient_is_an_error(target):
    def tripled(z: Tensor) -> Tensor:
        out = z.sin()
        out.register_hook(lambda g: 3 * g)
        return out

    x, y = batch()
    with pytest.raises(FastjacError, match=r"a hook .* on a tensor replaces its gradient"):
        with_jacobian(network(Apply(tripled)), x, target, y)  # a loss of J alone would not run it


def test_a_hook_on_a_parameter_may_replace_its_gradient():
    def halved(z: Tensor) -> Tensor:
        weight.register_hook(lambda g: g * 0.5)
        return z * weight

    x, y = batch()
    found = []
    for strategy in ("auto", "autograd"):
        weight = nn.Parameter(torch.full((4, 1, 1), 2.0, dtype=torch.float64))
        options = {"strategy": strategy, "batch_stats": "batch"}
        out = with_jacobian(network(Apply(halved)), x, LabelLogit(), y, **options)
        out.jacobian.square().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found, **EXACT)


def test_what_no_target_depends_on_may_be_overwritten():
    def logs(z: Tensor) -> Tensor:
        z = z * 1
        (z * z.sin()).mean()  # a statistic that nobody differentiates
        return z.add_(1)

    assert_steps_agree(network(Apply(logs)))


def test_lazy_layers():
    student = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).double()
    x, y = batch()
    out = with_jacobian(student, x, LabelLogit(), y)
    out.jacobian.square().sum().backward()
    assert student[0].weight.grad.norm() > 0


def test_conversions_and_derivatives_inside_are_errors():
    with pytest.raises(FastjacError, match=r"another library's array.*detach"):
        gradients(network(Apply(lambda z: z * float(z.numpy().mean()))), "auto")

    def force(z: Tensor) -> Tensor:
        return torch.autograd.grad((z * z).sum(), z, create_graph=True)[0]

    with pytest.raises(FastjacError, match=r"the model calls grad on what depends on x"):
        gradients(network(Apply(force)), "auto")


def test_a_compiled_loop_gives_the_eager_gradients_and_a_whole_graph_is_refused():
    student, teacher = network().eval(), network(seed=7)
    matcher = JacobianMatching(student, teacher)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        out = matcher(x * 1.0, y)
        return F.cross_entropy(out.student_logits, y) + out.jacobian_loss

    expected = torch.autograd.grad(loss(*batch()), list(student.parameters()))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fastjac runs eagerly"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*batch())
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    got = torch.autograd.grad(compiled(*batch()), list(student.parameters()))
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("scale", [65536.0, 2.0**20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "target", [LabelLogit(), AttentionWindow("3", window=0.3)], ids=["logit", "window"]
)
def test_mixed_precision_with_a_scaled_loss(target, dtype, scale):
    """Finite where the double backward's is, with at most twice its error; both against float64."""

    def step(strategy: str, amp: bool) -> Tensor:
        student, teacher = network(nn.SiLU()), network(nn.SiLU(), seed=7)
        x, y = batch()
        if amp:
            student, teacher, x = student.float(), teacher.float(), x.float()
        with torch.autocast("cpu", dtype, enabled=amp):
            matcher = JacobianMatching(
                student, teacher, target, batch_stats="batch", strategy=strategy
            )
            out = matcher(x, y)
            loss = F.cross_entropy(out.student_logits.double(), y) + out.jacobian_loss
        (loss * scale).backward()
        found = [p.grad for p in student.parameters() if p.grad is not None]
        return torch.cat([g.double().flatten() for g in found]) / scale

    exact, naive, ours = step("autograd", False), step("autograd", True), step("auto", True)
    if naive.isfinite().all():
        assert ours.isfinite().all()
        assert (ours - exact).norm() <= 2 * (naive - exact).norm()
