"""Hooks on the student's modules: each fires once, as in PyTorch."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    Logits,
    fuse,
    with_jacobian,
)

TARGETS = {"window": AttentionWindow("pool"), "logit": LabelLogit()}
EVERY = pytest.mark.parametrize(
    ("target", "strategy"),
    [("window", "local"), ("window", "dense"), ("logit", "dense")],
    ids=["local", "dense", "logit"],
)
LABELS = torch.tensor([0, 1, 3])
LEAVES = ["conv", "norm", "relu", "pool", "body.0", "body.1", "flat", "head"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 3, 3, padding=1),
            norm=nn.BatchNorm2d(3),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            body=nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU()),
            flat=nn.Flatten(),
            head=nn.Linear(192, 4),
        )
    ).double()


def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def matching(student: nn.Module, target: str = "window", strategy: str = "auto"):
    return JacobianMatching(student, network(7), TARGETS[target], strategy=strategy)


def step(matcher: JacobianMatching) -> tuple[Tensor, dict[str, Tensor]]:
    out = matcher(images(), LABELS)
    loss = out.student_logits.square().mean() + out.jacobian_loss
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in matcher.student.named_parameters()}


def check_step(student: nn.Module, target: str, strategy: str) -> None:
    expected = step(matching(network(), target, "autograd"))
    got = step(matching(student, target, strategy))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@EVERY
def test_a_forward_hook_fires_once_with_what_the_module_was_given_and_gave(target, strategy):
    student, plain, seen, expected = network(), network(), [], []
    for model, calls in ((student, seen), (plain, expected)):
        for name in LEAVES:
            model.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name, calls=calls: calls.append(
                    (name, args[0].clone(), out.clone())
                )
            )
    check_step(student, target, strategy)
    plain(images())
    assert [name for name, *_ in seen] == LEAVES
    for (_, *got), (_, *wanted) in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@EVERY
def test_hooks_with_keywords_and_pre_hooks_fire_once(target, strategy):
    student, calls = network(), []
    for name in LEAVES:
        module = student.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: calls.append(name))
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: calls.append(name), with_kwargs=True
        )
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: calls.append(name), with_kwargs=True
        )
    check_step(student, target, strategy)
    assert calls == [name for name in LEAVES for _ in range(3)]


def test_a_hook_that_gives_back_the_same_output_replaces_nothing():
    student = network()
    student.relu.register_forward_hook(lambda m, args, out: out)
    check_step(student, "window", "auto")


def test_a_hook_added_between_steps_fires_and_a_removed_one_does_not():
    student, calls = network(), []
    matcher = matching(student)
    step(matcher)
    handle = student.norm.register_forward_hook(lambda m, args, out: calls.append(1))
    for _ in range(2):
        step(matcher)
    handle.remove()
    step(matcher)
    assert calls == [1, 1]


REPLACING = {
    "output": lambda m: m.register_forward_hook(lambda m, args, out: 2 * out.sigmoid()),
    "input": lambda m: m.register_forward_pre_hook(lambda m, args: (2 * args[0].tanh(),)),
    "input, with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * args[0],), kwargs), with_kwargs=True
    ),
    "output, in place": lambda m: m.register_forward_hook(lambda m, args, out: out.mul_(2)),
}
PLACES = ["conv", "norm", "relu", "pool", "body.1", "head", "body", ""]


# In place at the norm, the ReLU or the pool, PyTorch too says that what they save, or the features,
# are overwritten.
CASES = [
    pytest.param(hook, name, id=f"{hook}-{name or 'student'}")
    for hook in REPLACING
    for name in PLACES
    if "place" not in hook or name not in ("norm", "relu", "pool")
]


@pytest.mark.parametrize(("hook", "name"), CASES)
@EVERY
def test_a_hook_that_replaces_is_differentiated(target, strategy, hook, name):
    """On leaves, containers and the student itself; what the hook computes is a part of the model."""
    found = []
    for way in (strategy, "autograd"):
        student = network()
        REPLACING[hook](student.get_submodule(name))
        found.append(step(matching(student, target, way)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


BACKWARD = {
    "full": lambda m, note: m.register_full_backward_hook(lambda m, gin, gout: note([*gin, *gout])),
    "full, pre": lambda m, note: m.register_full_backward_pre_hook(lambda m, gout: note(gout)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", PLACES, ids=lambda name: name or "student")
@pytest.mark.parametrize("hook", BACKWARD)
@EVERY
def test_a_backward_hook_fires_as_in_pytorch(target, strategy, hook, name):
    """Once, in the backward of the loss; of a loss of the output alone, with PyTorch's gradients."""
    student, plain, seen, expected = network(), network(), [], []
    for model, calls in ((student, seen), (plain, expected)):
        BACKWARD[hook](
            model.get_submodule(name),
            lambda grads, calls=calls: calls.append([g if g is None else g.clone() for g in grads]),
        )
    matcher = matching(student, target, strategy)
    matcher(images(), LABELS).student_logits.square().mean().backward()
    plain(images()).square().mean().backward()
    assert len(seen) == len(expected) == 1
    for got, wanted in zip(seen[0], expected[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    got, wanted = ({k: p.grad for k, p in model.named_parameters()} for model in (student, plain))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    student.zero_grad()
    seen.clear()
    got = step(matcher)
    assert len(seen) == 1
    expected = network()
    expected(images())  # the running statistics of a second step
    torch.testing.assert_close(
        got, step(matching(expected, target, "autograd")), rtol=1e-9, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@EVERY
def test_a_backward_hook_that_replaces_the_gradient_does_so(target, strategy):
    """Of the loss: J, which is a value of the forward, is as it was."""
    student, plain = network(), network()
    for model in (student, plain):
        model.body[1].register_full_backward_hook(lambda m, gin, gout: (3 * gin[0],))
    out = matching(student, target, strategy)(images(), LABELS)
    reference = matching(network(), target, "autograd")(images(), LABELS)
    torch.testing.assert_close(out.jacobian_loss, reference.jacobian_loss, rtol=1e-9, atol=1e-12)
    out.student_logits.square().mean().backward()
    plain(images()).square().mean().backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_the_matchers_own_hooks_fire():
    matcher, calls = matching(network()), []
    matcher.register_forward_hook(lambda m, args, out: calls.append(out.jacobian_loss))
    assert matcher(images(), LABELS).jacobian_loss is calls[0]


class Watches(nn.Module):
    """Registers a hook on its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Tensor) -> Tensor:
        x.register_hook(self.seen.append)
        return self.inner(x)


def test_a_hook_on_the_input_sees_the_jacobian():
    model = Watches(network())
    out = with_jacobian(model, images(), LabelLogit(), LABELS)
    assert len(model.seen) == 1
    torch.testing.assert_close(model.seen[0], out.jacobian.detach(), rtol=0, atol=0)


def test_a_hook_sees_each_row_of_the_jacobian_as_in_a_double_backward():
    """Once, though the backward takes each row's reverse sweep again."""

    def seen(strategy: str) -> list[Tensor]:
        found = []

        def register(module: nn.Module, args: tuple[Tensor], z: Tensor) -> None:
            z.register_hook(lambda g: found.append(g.detach().clone()))

        model = network()
        model.body[0].register_forward_hook(register)
        out = with_jacobian(model, images(), Logits(), LABELS, strategy=strategy)
        out.jacobian.square().sum().backward()
        return found

    expected = seen("autograd")
    assert len(expected) == 5  # four rows, and the loss of J
    torch.testing.assert_close(seen("dense"), expected, rtol=1e-9, atol=1e-12)


# Hooks on autograd nodes


def of_node(z: Tensor) -> None:
    z.grad_fn.register_hook(lambda gin, gout: tuple(None if g is None else 2 * g for g in gin))


def before_node(z: Tensor) -> None:
    z.grad_fn.register_prehook(lambda gout: (2 * gout[0],))


def of_the_node_behind(z: Tensor) -> None:
    node = z.sin().grad_fn.next_functions[0][0]
    node.register_prehook(lambda gout: (2 * gout[0],))


def hooked(register, name: str) -> nn.Sequential:
    model = network()
    model.get_submodule(name).register_forward_hook(lambda m, args, out: register(out))
    return model


@pytest.mark.parametrize("register", [of_node, before_node, of_the_node_behind])
@pytest.mark.parametrize("name", ["norm", "body.0"])
def test_a_hook_on_an_autograd_node_is_an_error(name, register):
    with pytest.raises(
        FastjacError, match=r"registers a hook on the autograd node .* depends on x"
    ):
        with_jacobian(hooked(register, name), images(), LabelLogit(), LABELS)


@pytest.mark.parametrize("register", [of_node, before_node])
def test_a_hook_on_an_autograd_node_acts_in_a_fused_network(register):
    found = []
    for wrap in (lambda model: model, fuse):
        model = hooked(register, "norm")
        wrap(model)(images()).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_hooks_that_are_removed_and_nodes_without_one():
    def register(z: Tensor) -> None:
        z.register_hook(lambda g: 2 * g).remove()
        z.grad_fn.register_prehook(lambda gout: (2 * gout[0],)).remove()
        weight = (2 * model.head.weight).grad_fn
        weight.register_prehook(lambda gout: (2 * gout[0],))  # not of x

    model = hooked(register, "body.0")
    check_step(model, "logit", "dense")
