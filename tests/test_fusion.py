"""A fused network is the network: the same numbers, the same state, less kept for the backward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    fuse,
    input_jacobian,
)
from fastjac.jacobian import Forward
from fastjac.ops import _library

EXACT = {"rtol": 1e-11, "atol": 1e-12}
C = 4


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        y = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.2)
        return F.max_pool2d(F.relu(y), 2)


class Residual(nn.Module):
    """A block as in torchvision, with a norm on its shortcut; ``inplace`` as it is there."""

    def __init__(self, inplace: bool = True, activate: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(C) for _ in range(3))
        self.short = nn.Conv2d(C, C, 1)
        self.relu = nn.ReLU(inplace) if activate else nn.Identity()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        short = self.norm3(self.short(x))
        if not self.inplace:
            return self.relu(short + y)
        y += short
        return self.relu(y)


class Read(nn.Module):
    """Something reads BatchNorm's output, or the activation's, beside the chain."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.norm, self.relu, self.pool = nn.BatchNorm2d(C), nn.ReLU(), nn.MaxPool2d(2)
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.relu(y)
        other = {"norm": y, "relu": z, "self": y}[self.which]
        return self.relu(y + y) if self.which == "self" else self.pool(z) + other.mean()


class Broadcast(nn.Module):
    """The residual is smaller than the map, and depends on x or is a parameter."""

    def __init__(self, of_x: bool) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(C), nn.ReLU()
        self.shift = nn.Parameter(torch.linspace(-1, 1, C).view(1, C, 1, 1))
        self.of_x = of_x

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift * x.mean((2, 3), keepdim=True) if self.of_x else self.shift
        return self.relu(self.norm(x) + shift)


class Flat(nn.Module):
    """Functional BatchNorm of ``[B, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        n, x = self.norm, x.mean((2, 3))
        y = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training)
        return F.relu(y)[:, :, None, None]


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        mean, var = n.running_mean, n.running_var
        return F.relu(F.batch_norm(input=n(input=x), running_mean=mean, running_var=var))


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x.float() + self.norm(x))


class Enlarged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(x.mean((2, 3), keepdim=True)))


class Branching(nn.Module):
    """Its forward reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) if x.mean() < 0 else self.norm(-x)


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.norm(x)), x


class Product(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * pair[1]


def chain(*layers: nn.Module, **norm) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(C, **norm), *layers)


# The middle of a network; activation, pool, and whether it adds, of each fused operator, as they run.
MIDDLES = {
    "relu": (lambda: chain(nn.ReLU()), ["relu none"]),
    "relu in place": (lambda: chain(nn.ReLU(inplace=True)), ["relu none"]),
    "relu6": (lambda: chain(nn.ReLU6()), ["relu6 none"]),
    "leaky": (lambda: chain(nn.LeakyReLU(0.3)), ["leaky_relu none"]),
    "silu": (lambda: chain(nn.SiLU()), ["silu none"]),
    "2x2": (lambda: chain(nn.ReLU(), nn.MaxPool2d(2)), ["relu 2x2"]),
    "3x3": (lambda: chain(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), ["relu 3x3"]),
    "3x3 unpadded": (lambda: chain(nn.SiLU(), nn.MaxPool2d(3, 2)), ["silu 3x3-unpadded"]),
    "no activation": (lambda: chain(nn.MaxPool2d(2)), ["none 2x2"]),
    "pool, then relu": (lambda: chain(nn.MaxPool2d(2), nn.ReLU()), ["none 2x2"]),
    "residual": (lambda: Residual(), ["relu none", "none none", "relu none +"]),
    "residual, out of place": (
        lambda: Residual(inplace=False),
        ["relu none", "none none", "relu none +"],
    ),
    "residual, no activation": (
        lambda: Residual(activate=False),
        ["none none", "none none", "none none +"],
    ),
    "functional": (Functional, ["relu 2x2"]),
    "two": (lambda: nn.Sequential(chain(nn.ReLU()), chain(nn.SiLU())), ["relu none", "silu none"]),
    "no affine": (lambda: chain(nn.ReLU(), affine=False), ["relu none"]),
    "no running": (lambda: chain(nn.ReLU(), track_running_stats=False), ["relu none"]),
    "averaging": (lambda: chain(nn.ReLU(), momentum=None), ["relu none"]),
    "identity in between": (lambda: chain(nn.Identity(), nn.ReLU()), ["relu none"]),
    "ceiling": (lambda: chain(nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)), ["relu none"]),
    "overlap": (lambda: chain(nn.ReLU(), nn.MaxPool2d(3, 1)), ["relu none"]),
    "dilated": (lambda: chain(nn.ReLU(), nn.MaxPool2d(2, 2, dilation=2)), ["relu none"]),
    "rising leaky": (lambda: chain(nn.LeakyReLU(-0.3)), ["none none"]),
    "gelu": (lambda: chain(nn.GELU()), ["none none"]),
    "norm read twice": (lambda: Read("norm"), ["none none", "relu 2x2"]),
    "relu read twice": (lambda: Read("relu"), ["relu none", "relu 2x2"]),
    "added to itself": (lambda: Read("self"), ["none none"]),
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm2d(C, affine=True), nn.ReLU()), []),
    "by keyword": (ByKeyword, ["none none", "relu none"]),
    "another dtype added": (Single, ["relu none +"]),
    "a parameter added": (lambda: Broadcast(of_x=False), ["relu none +"]),
    "a vector added": (lambda: Broadcast(of_x=True), ["relu none +"]),
    "vectors": (Flat, ["relu none"]),
    "a sum larger than the map": (Enlarged, ["none none"]),
    "branching": (Branching, ["relu none"]),
    "a pair": (lambda: nn.Sequential(Pair(), Product()), ["relu none"]),
}
EVERY = pytest.mark.parametrize("middle", MIDDLES)
SOME = pytest.mark.parametrize("middle", ["2x2", "residual", "functional"])


def network(middle: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    last = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * C, 5))
    model = nn.Sequential(nn.Conv2d(3, C, 3), MIDDLES[middle][0](), last).double()
    for name, p in model.named_parameters():
        if "norm" in name or name.startswith("1.0."):
            nn.init.uniform_(p, -1, 1.5)
    return model


def images(seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(3, 3, 13, 16, generator=make, dtype=torch.float64)


class FusedCalls(TorchDispatchMode):
    """Notes activation, pool, and whether it adds, of each fused operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is torch.ops.fastjac.norm_act_pool:
            _, residual, *_, activation, _, pool = args
            self.found.append(f"{activation} {pool}" + " +" * (residual is not None))
        return func(*args, **kwargs or {})


def fused_calls(model: nn.Module, x: Tensor | None = None) -> list[str]:
    """Those of one forward."""
    with FusedCalls() as calls:
        model(images() if x is None else x)
    return calls.found


def step(model: nn.Module, x: Tensor) -> tuple:
    """Everything a step gives: outputs, gradients of parameters and input, buffers."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    (y.square().mean() + y[:, 0].exp().mean()).backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    return y.detach(), grads, x.grad, copy.deepcopy(dict(model.named_buffers()))


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_is_fused(middle, training):
    model, expected = network(middle).train(training), MIDDLES[middle][1]
    assert fused_calls(model) == []
    assert fused_calls(fuse(model)) == expected
    with torch.no_grad():
        assert fused_calls(fuse(model)) == expected


@EVERY
def test_a_norm_takes_its_statistics_once(middle):
    """However often its output is computed."""
    model = fuse(network(middle))
    statistics = {n: b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    model(images())
    assert all(count <= 1 for count in statistics.values())


@EVERY
def test_outputs_gradients_and_statistics_are_the_networks(middle):
    fused, plain = fuse(network(middle)), network(middle)
    for seed, training in enumerate((True, True, False, True)):
        got = step(fused.train(training), images(seed))
        torch.testing.assert_close(got, step(plain.train(training), images(seed)), **EXACT)


@EVERY
def test_without_a_graph(middle):
    fused, plain = fuse(network(middle)).eval(), network(middle).eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(fused(images()), plain(images()), **EXACT)


@SOME
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_low_precision_errs_at_most_twice_as_much(middle, last):
    layout = torch.channels_last if last else torch.contiguous_format
    exact = step(network(middle), images())
    errors = []
    for wrap in (fuse, lambda m: m):
        model = wrap(network(middle).to(torch.float32, memory_format=layout))
        x = images().float().contiguous(memory_format=layout)
        with FusedCalls() as calls:
            got = step(model, x)
        assert (calls.found != []) == (wrap is fuse)
        pairs = zip(tensors(got), tensors(exact), strict=True)
        errors.append(sum(((a.double() - b).norm() / (1 + b.norm())).item() for a, b in pairs))
    assert 0 < errors[0] <= 2 * errors[1]


def tensors(result: tuple) -> list[Tensor]:
    y, grads, gx, _ = result
    return [y, *grads.values(), gx]


# What is shared


@SOME
def test_state_dict_parameters_and_modules_are_the_models(middle):
    model = network(middle)
    fused = fuse(model)
    assert list(fused.state_dict()) == list(network(middle).state_dict())
    assert [k for k, _ in fused.named_modules()] == [k for k, _ in model.named_modules()]
    pairs = zip(fused.named_parameters(), model.named_parameters(), strict=True)
    assert all(a == b and p is q for (a, p), (b, q) in pairs)
    fused.load_state_dict(network(middle, seed=1).state_dict())
    torch.testing.assert_close(step(model, images()), step(network(middle, 1), images()), **EXACT)


@SOME
def test_training_either_trains_both(middle):
    model = network(middle)
    fused, alone = fuse(model), network(middle)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1) for m in (fused, model, alone)]
    for seed in range(4):
        step((fused, model)[seed % 2], images(seed))
        step(alone, images(seed))
        optimisers[seed % 2].step()
        optimisers[2].step()
    torch.testing.assert_close(fused.state_dict(), alone.state_dict(), **EXACT)
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), **EXACT)


def test_a_module_assigned_to_one_is_the_others():
    model = network("2x2")
    fused = fuse(model)
    step(fused, images())
    setattr(fused, "1", chain(nn.SiLU()).double())
    assert model[1] is getattr(fused, "1")
    assert fused_calls(fused) == ["silu none"]
    torch.testing.assert_close(fused.eval()(images()), copy.deepcopy(model)(images()), **EXACT)
    model[1][1] = nn.GELU()
    assert fused_calls(fused) == ["none none"]
    torch.testing.assert_close(fused(images()), copy.deepcopy(model)(images()), **EXACT)


@SOME
def test_unfuse_gives_the_model_back_in_the_fused_ones_mode(middle):
    model = network(middle)
    fused = fuse(model)
    assert fused.unfuse() is model
    assert fused.eval().unfuse().training is False
    assert not any(m.training for m in model.modules())
    assert fused.train().unfuse().training is True


@SOME
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies(middle, duplicate):
    fused, plain = fuse(network(middle)), network(middle)
    step(fused, images())
    step(plain, images())
    other = duplicate(fused)
    torch.testing.assert_close(step(other, images(1)), step(plain, images(1)), **EXACT)
    for p in other.parameters():
        p.data.zero_()
    assert fused(images()).norm() > 0
    assert other(images()).norm() == other.unfuse()(images()).norm() == 0
    assert fused_calls(other) == MIDDLES[middle][1]
    ours = {id(p) for p in other.parameters()}
    assert ours == {id(p) for p in other.unfuse().parameters()}
    assert ours.isdisjoint(id(p) for p in fused.parameters())


def test_hooks():
    model, calls = network("2x2"), []
    fused, plain = fuse(model), network("2x2")
    handle = model[1][1].register_forward_hook(lambda m, args, y: calls.append(y.shape))
    assert fused_calls(fused) == ["relu 2x2"]  # it reads no values
    assert calls == [(3, C, 11, 14)]
    handle.remove()
    handle = model[1][1].register_forward_hook(lambda m, args, y: calls.append(y.clone()))
    assert fused_calls(fused) == ["relu none"]
    plain(images())
    torch.testing.assert_close(calls[1], plain[1][:2](plain[0](images())), **EXACT)
    handle.remove()
    assert fused_calls(fused) == ["relu 2x2"]
    model[1][2].register_forward_hook(lambda m, args, y: 2 * y)
    assert fused_calls(fused) == ["relu 2x2"]
    torch.testing.assert_close(fused.eval()(images()), model(images()), **EXACT)
    fused.register_forward_hook(lambda m, args, y: calls.append(y.shape))
    fused(images())
    assert calls[2:] == [(3, 5)]


HOOKS = {
    "output": lambda m, note: m.register_forward_hook(lambda m, args, y: (note(y), y.sigmoid())[1]),
    "input": lambda m, note: m.register_forward_pre_hook(
        lambda m, args: (note(args[0]), args[0] * 2)[1]
    ),
    "backward": lambda m, note: m.register_full_backward_hook(lambda m, gx, gy: note(gx[0])),
    "gradient": lambda m, note: m.register_full_backward_hook(lambda m, gx, gy: (2 * gx[0],)),
}


@pytest.mark.parametrize("place", ["1", "1.0", "1.1", "1.2", "2", ""])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_and_replace_what_they_do_in_pytorch(hook, place):
    """On leaves, containers and the network itself."""
    found, fused = [], []
    for wrap in (fuse, lambda model: model):
        model, seen = network("2x2"), []
        wrapped = wrap(model)
        HOOKS[hook](
            wrapped.get_submodule(place), lambda t, seen=seen: seen.append(t.detach().clone())
        )
        with FusedCalls() as calls:
            found.append((step(wrapped, images()), seen))
        fused.append(calls.found)
    assert fused[1] == []
    assert fused[0], "nothing was fused beside the hook"
    assert (hook == "gradient") == (not found[0][1])
    torch.testing.assert_close(*found, **EXACT)


def test_frozen_parameters():
    fused, plain = fuse(network("residual")), network("residual")
    for model in (fused, plain):
        model.get_parameter("1.norm1.weight").requires_grad_(False)
        model.get_parameter("1.norm2.bias").requires_grad_(False)
    got, expected = step(fused, images()), step(plain, images())
    torch.testing.assert_close(got, expected, **EXACT)
    assert [k for k, grad in got[1].items() if grad is None] == ["1.norm1.weight", "1.norm2.bias"]
    assert fused_calls(fused) == MIDDLES["residual"][1]


def test_what_a_later_operation_overwrites_is_kept():
    """An in-place operation's result lies where the activation lay, and is not made again by it."""

    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x).sigmoid_()

    layers = (nn.BatchNorm2d(C), Overwrites(), nn.Conv2d(C, C, 3), nn.AdaptiveAvgPool2d(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3), *layers, nn.Flatten()).double()
    assert fused_calls(fuse(model)) == ["silu none"]
    expected = step(copy.deepcopy(model), images())
    torch.testing.assert_close(step(fuse(model), images()), expected, **EXACT)


# What a branch, an attribute or a patched forward does in this step is what happens


def test_control_flow_follows_each_batch():
    fused, plain = fuse(network("branching")), network("branching")
    for seed, sign in enumerate((1, -1, 1)):
        x = sign * images(seed)
        torch.testing.assert_close(step(fused, x), step(plain, x), **EXACT)


def test_an_attribute_and_a_forward_that_change_between_steps():
    fused, plain = fuse(network("leaky")), network("leaky")
    for slope in (0.1, 0.6):
        for model in (fused, plain):
            model.get_submodule("1.1").negative_slope = slope
        torch.testing.assert_close(step(fused, images()), step(plain, images()), **EXACT)
    for model in (fused, plain):
        norm = model.get_submodule("1.0")
        norm.forward = lambda x, forward=norm.forward: forward(2 * x) + 1
    torch.testing.assert_close(step(fused, images()), step(plain, images()), **EXACT)


def test_structures_are_returned_as_they_are():
    fused, plain = fuse(Pair().double()), Pair().double()
    x = images().mean(1, True).expand(-1, C, -1, -1)
    got = fused(x)
    assert type(got) is tuple
    assert got[1] is x
    torch.testing.assert_close(got, plain(x), **EXACT)


# Errors


def test_fused_twice_is_an_error():
    with pytest.raises(FastjacError, match="fuse: the model is fused already"):
        fuse(fuse(network("relu")))


def test_student_and_teacher_may_not_be_one_network_fused():
    model = network("2x2")
    for student, teacher in ((fuse(model), model), (model, fuse(model))):
        with pytest.raises(FastjacError, match="student and teacher share a module: '0' is '0'"):
            JacobianMatching(student, teacher)


def test_one_value_per_channel_is_an_error():
    fused = fuse(chain(nn.ReLU()))
    with pytest.raises(
        ValueError, match=r"training needs more than 1 value per channel, got u \[1,"
    ):
        fused(torch.rand(1, C, 1, 1))
    assert fused.eval()(torch.rand(1, C, 1, 1)).shape == (1, C, 1, 1)


def test_a_second_derivative_is_an_error():
    x = images().requires_grad_()
    (gx,) = torch.autograd.grad(fuse(network("2x2")).eval()(x).square().sum(), x)
    assert gx.norm() > 0
    with pytest.raises(FastjacError, match="differentiates once"):
        torch.autograd.grad(fuse(network("2x2"))(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "middle",
    [
        *("a parameter added", "a vector added", "another dtype added", "vectors", "2x2"),
        *("a sum larger than the map", "branching", "norm read twice", "residual"),
    ],
)
@pytest.mark.parametrize("fused", [False, True], ids=["model", "fused model"])
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("target", [AttentionWindow("1"), LabelLogit()], ids=["window", "logit"])
def test_the_engine_runs_the_same_chains(middle, target, batch_stats, fused):
    y, results = torch.tensor([0, 1, 4]), []
    for strategy in ("auto", "autograd"):
        student = network(middle)
        teacher = network(middle, 1)
        if fused:
            student, teacher = fuse(student), fuse(teacher)
        matcher = JacobianMatching(student, teacher, target, None, batch_stats, strategy)
        with FusedCalls() as calls:
            out = matcher(images(), y)
        if strategy == "auto":
            assert set(MIDDLES[middle][1]) <= set(calls.found)
        else:
            assert not calls.found
        (out.jacobian_loss + out.student_logits.square().mean()).backward()
        results.append((out.jacobian_loss.detach(), [p.grad for p in student.parameters()]))
    rounding = 1e-5 if "dtype" in middle else 1e-9
    torch.testing.assert_close(*results, rtol=rounding, atol=1e-3 * rounding)


@pytest.mark.parametrize("strategy", ["auto", "autograd"])
def test_a_fused_model_has_the_jacobian_of_the_model(strategy):
    target = AttentionWindow("1")
    got = input_jacobian(fuse(network("2x2")), images(), target, strategy=strategy)
    expected = input_jacobian(network("2x2"), images(), target, strategy="autograd")
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


class Elsewhere(nn.Module):
    """Its input on another device."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to("meta")


def chains(*between: nn.Module) -> nn.Module:
    first = [nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *between, nn.BatchNorm2d(C), nn.ReLU(), nn.Flatten(1)).double()


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: fuse(model)(x),
        lambda model, x: Forward(model, x, (LabelLogit(),), None, (), None, "frozen").read,
    ],
    ids=["fuse", "engine"],
)
def test_chains_begin_only_where_their_operators_are_native(monkeypatch, run):
    """With the CPU's library alone, not on another device; without it, not on the CPU."""
    absent = {name: _library.NativeLibrary(name, None, "not built") for name in ("cuda", "cpu")}
    monkeypatch.setitem(_library.LIBRARIES, "cuda", absent["cuda"])
    assert not _library.native(torch.device("cuda", 0))
    model, x = chains(), images()
    with FusedCalls() as calls:
        y = run(model, x)
    assert calls.found == ["relu 2x2", "relu none"]
    two_devices = chains(Elsewhere())
    two_devices[5].to("meta")
    with FusedCalls() as calls:
        assert run(two_devices, x).shape == y.shape
    assert calls.found == ["relu 2x2"]
    monkeypatch.setitem(_library.LIBRARIES, "cpu", absent["cpu"])
    with FusedCalls() as calls:
        torch.testing.assert_close(run(model, x), y, **EXACT)
    assert not calls.found
