"""What a fused network saves for its backward, and what it recomputes instead."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef

from fastjac import AttentionWindow, FastjacError, JacobianMatching, fuse

EXACT = {"rtol": 1e-11, "atol": 1e-12}
C = 4


def images() -> Tensor:
    make = torch.Generator().manual_seed(0)
    return 4 * torch.rand(3, 3, 13, 16, generator=make, dtype=torch.float64)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the storages that autograd saves, the input and the parameters apart."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    for t in (x, *model.parameters(), *model.buffers()):
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("pool", "plain", "fused"),
    [("2x2", 11, 5), ("3x3", 11, 5), ("", 8, 4)],
    ids=["2x2", "3x3", "none"],
)
def test_bytes_kept_for_the_backward(pool, plain, fused):
    """Of each float32 element of u. The convolution that follows keeps its input too, if not fused."""
    pools = {"2x2": [nn.MaxPool2d(2)], "3x3": [nn.MaxPool2d(3, 2, 1)], "": []}[pool]
    first = nn.Conv2d(24, 8, 3, padding=1)  # of more products than are worth recomputing u
    model = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), *pools, nn.Conv2d(8, 1, 1))
    x = torch.rand(2, 24, 64, 64)
    elements = first(x).numel()
    assert saved_bytes(model, x) / elements == pytest.approx(plain, abs=0.05)
    assert saved_bytes(fuse(model), x) / elements == pytest.approx(fused, abs=0.05)


def unpooled() -> nn.Sequential:
    """A chain without a pool, whose output two convolutions and a sum read."""
    torch.manual_seed(0)
    head = (nn.BatchNorm2d(C), nn.ReLU(), Branches(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, C, 3), *head).double()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) + x


@pytest.mark.parametrize("what", ["a parameter", "an output"])
def test_what_is_saved_beside_a_recomputed_map_must_not_be_overwritten(what):
    """Autograd looks at no version of what is saved by hooks."""
    model, outputs = unpooled(), []
    model[3] = nn.Tanh() if what == "an output" else model[3]
    model[3].register_forward_hook(lambda module, args, y: outputs.append(y))
    loss = fuse(model)(images()).square().sum()
    changed = outputs[0] if what == "an output" else model[3].a.weight
    with torch.no_grad():
        changed.mul_(2)
    shape = re.escape(str(list(changed.shape)))
    with pytest.raises(FastjacError, match=rf"{shape} that the backward needs was overwritten"):
        loss.backward()


def test_an_activation_is_not_kept_but_recomputed():
    model, alive = unpooled(), []
    model[3].a.register_forward_pre_hook(
        lambda module, args: alive.append(StorageWeakRef(args[0].untyped_storage()))
    )
    x = images()
    y = fuse(model)(x)
    assert [ref.expired() for ref in alive] == [True]
    check_gradients(y, model, x)


def check_gradients(y: Tensor, model: nn.Module, x: Tensor) -> None:
    """Of y, what ``model``, fused, gave for x: once, again, and for the last time."""
    plain = copy.deepcopy(model)
    expected = torch.autograd.grad(plain(x).square().sum(), plain.parameters())
    loss = y.square().sum()
    for retain in (True, True, False):
        got = torch.autograd.grad(loss, model.parameters(), retain_graph=retain)
        torch.testing.assert_close(got, expected, **EXACT)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, model.parameters())


def test_an_activation_is_recomputed_beside_hooks_of_the_callers():
    model, x, seen = unpooled(), images(), []
    activation = copy.deepcopy(model)[:3](x)

    def pack(t: Tensor) -> Tensor:
        seen.append(t.clone())
        return seen[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fuse(model)(x)
    alike = [t for t in seen if t.shape == activation.shape]
    assert alike  # what it is recomputed from is saved
    assert not any(torch.allclose(t, activation) for t in alike)
    got = torch.autograd.grad(y.square().sum(), model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    torch.testing.assert_close(got, expected, **EXACT)


def test_what_an_activation_is_recomputed_from_must_not_be_overwritten():
    model = unpooled()
    loss = fuse(model)(images()).square().sum()
    with torch.no_grad():
        model[1].weight.mul_(2)
    # This weight's gradient reads the activation, and nothing else that depends on the norm's weight.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, model[3].a.weight)


FIRST = {
    "bias": lambda: nn.Conv2d(3, 2 * C, 3, padding=1),
    "no bias": lambda: nn.Conv2d(3, 2 * C, 3, bias=False),
    "strided": lambda: nn.Conv2d(3, 24, 3, stride=2, dilation=2, padding=1),
    "same": lambda: nn.Conv2d(3, 2 * C, (3, 5), padding="same"),
    "circular": lambda: nn.Conv2d(3, 2 * C, 3, padding=1, padding_mode="circular"),
    "groups": lambda: nn.Conv2d(3, 12, 3, groups=3),
}


def with_first(name: str, *pool: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)  # before all layers, so that two of them are alike
    first = FIRST[name]()
    norm = nn.BatchNorm2d(first.out_channels)
    last = nn.Conv2d(first.out_channels, C, 3)
    layers = (norm, nn.ReLU(), *pool, last, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(first, *layers).double()


def outputs_of(module: nn.Module) -> list[StorageWeakRef]:
    """The memory of what the module's next forward gives; filled once that has run."""
    found = []

    def note(module: nn.Module, args: tuple, value: Tensor) -> None:
        found.append(StorageWeakRef(value.untyped_storage()))
        handle.remove()

    handle = module.register_forward_hook(note)
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", ["none", "2x2", "3x3"])
@pytest.mark.parametrize("first", FIRST)
def test_a_first_convolution_is_not_kept_but_recomputed(first, pool, memory_format):
    pools = {"none": [], "2x2": [nn.MaxPool2d(2)], "3x3": [nn.MaxPool2d(3, 2, 1)]}[pool]
    model = with_first(first, *pools).to(memory_format=memory_format)
    kept = outputs_of(model[0])
    x = images().contiguous(memory_format=memory_format)
    y = fuse(model)(x)
    assert [ref.expired() for ref in kept] == [True]
    check_gradients(y, model, x)


def test_what_a_first_convolution_is_recomputed_from():
    """Its weight and input must be as they were; of its bias a copy is kept, as PyTorch needs none."""
    model = with_first("bias")
    x = images()
    loss = fuse(model)(x).square().sum()
    with torch.no_grad():
        model[0].bias.add_(100)
    got = torch.autograd.grad(loss, model[1].weight, retain_graph=True)
    with torch.no_grad():
        model[0].bias.sub_(100)
    again = torch.autograd.grad(loss, model[1].weight, retain_graph=True)
    torch.testing.assert_close(got, again, **EXACT)
    for overwritten in (model[0].weight, x):
        loss = fuse(model)(x).square().sum()
        with torch.no_grad():
            overwritten.mul_(2)
        # The norm's gradient reads the convolution's output, not what that came from.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, model[1].weight)


def test_a_first_convolution_is_recomputed_as_autocast_made_it():
    x, gradients = images().float(), []
    for wrap in (fuse, lambda model: model):
        model = with_first("bias", nn.MaxPool2d(2)).float()
        kept = outputs_of(model[0])
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrap(model)(x).square().sum()
        assert [ref.expired() for ref in kept] == [wrap is fuse]
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    got, expected = gradients
    assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("strategy", ["local", "dense"])
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_the_engine_recomputes_a_first_convolution(strategy, batch_stats):
    if strategy == "local" and batch_stats == "batch":
        pytest.skip("batch statistics are not local")
    gradients = []
    for way in (strategy, "autograd"):
        student, teacher = (with_first("bias", nn.MaxPool2d(2)) for _ in range(2))
        nn.init.normal_(teacher[0].weight, generator=torch.Generator().manual_seed(1))
        target = AttentionWindow("3", window=1 / 3)
        matcher = JacobianMatching(student, teacher, target, batch_stats=batch_stats, strategy=way)
        kept = outputs_of(student[0])
        out = matcher(images())
        if way == "local":  # on whole maps the sweeps read it
            assert [ref.expired() for ref in kept] == [True]
        (out.jacobian_loss + out.student_logits.square().sum()).backward()
        gradients.append([p.grad for p in student.parameters()])
    torch.testing.assert_close(*gradients, **EXACT)


def test_torch_compile_trains_a_fused_network():
    """Compiled, the model runs as it is: the compiler fuses."""
    model = with_first("bias")
    fused = fuse(model)
    gradients, compiled = [], CompileCounterWithBackend("aot_eager")
    for run in (torch.compile(fused, backend=compiled), model):
        loss = run(images()).square().sum()
        gradients.append(torch.autograd.grad(loss, model.parameters()))
    torch.testing.assert_close(*gradients, **EXACT)
    (graph,) = compiled.graphs
    assert "batch_norm" in graph.code
    assert "norm_act_pool" not in graph.code


def test_a_convolution_may_name_its_arguments():
    class Named(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.conv2d(input=x, weight=self.weight, bias=self.bias)

    model, x = Named(3, 8, 3), torch.rand(2, 3, 8, 8)
    assert torch.equal(fuse(model)(x), model(x))
