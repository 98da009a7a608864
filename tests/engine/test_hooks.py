"""Hooks on the student's modules: each fires once as in PyTorch, or the step says that it cannot."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from fastjac import AttentionWindow, FastjacError, JacobianMatching, LabelLogit

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
    r"a forward hook of module '{}' replaces its output.*strategy='autograd'": (
        lambda m: m.register_forward_hook(lambda m, args, out: 2 * out)
    ),
    r"a forward pre-hook of module '{}' replaces its input.*strategy='autograd'": (
        lambda m: m.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    ),
    r"module '{}' has a backward hook.*strategy='autograd' runs it": (
        lambda m: m.register_full_backward_hook(lambda m, gin, gout: None)
    ),
    r"module '{}' has a backward hook.*Jacobian's passes": (
        lambda m: m.register_full_backward_pre_hook(lambda m, gout: None)
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["conv", "relu", "body.1"])
@pytest.mark.parametrize("message", REPLACING)
def test_a_hook_that_the_passes_would_miss_is_an_error(message, name):
    student = network()
    REPLACING[message](student.get_submodule(name))
    with pytest.raises(FastjacError, match=message.format(name)):
        matching(student, "logit")(images(), LABELS)
    step(matching(student, "logit", "autograd"))


@pytest.mark.parametrize("message", REPLACING)
@pytest.mark.parametrize("name", ["body", ""], ids=["container", "student"])
def test_a_hook_on_a_module_that_is_traced_through_is_an_error(name, message):
    student = network()
    REPLACING[message](student.get_submodule(name))
    matcher = matching(student, "logit")
    place = f"module '{name}'" if name else "the Sequential"
    expected = f"{place} has a hook.*traced through: hook its last leaf.*strategy='autograd'"
    with pytest.raises(FastjacError, match=expected):
        matcher(images(), LABELS)
    with torch.no_grad():
        matching(student, "logit", "autograd")(images(), LABELS)


def test_the_matchers_own_hooks_fire():
    matcher, calls = matching(network()), []
    matcher.register_forward_hook(lambda m, args, out: calls.append(out.jacobian_loss))
    assert matcher(images(), LABELS).jacobian_loss is calls[0]
