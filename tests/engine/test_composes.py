"""The matcher among what training code does: modes, hooks, copies, accumulation, other loss terms."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac import AttentionWindow, FastjacError, JacobianMatching, LabelLogit, input_jacobian

EXACT = {"rtol": 1e-9, "atol": 1e-12}
TARGETS = {"window": AttentionWindow("pool"), "logit": LabelLogit()}
EVERY = pytest.mark.parametrize(
    ("target", "strategy"),
    [("window", "local"), ("window", "dense"), ("logit", "dense")],
    ids=["local", "dense", "logit"],
)
LABELS = torch.tensor([0, 1, 3])


def network(seed: int = 0, width: int = 3, normalise: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d if normalise else nn.Identity
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, width, 3, padding=1),
            norm=norm(width),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            body=nn.Sequential(nn.Conv2d(width, width, 3, padding=1), norm(width), nn.GELU()),
            flat=nn.Flatten(),
            head=nn.Linear(width * 64, 4),
        )
    ).double()


def images(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


def matching(student: nn.Module, target: str = "window", strategy: str = "auto", **options):
    return JacobianMatching(student, network(7), TARGETS[target], strategy=strategy, **options)


def total(matcher: nn.Module, x: Tensor, y: Tensor = LABELS) -> Tensor:
    """A loss with other terms beside the Jacobian's, so that everything is used twice."""
    out = matcher(x, y)
    loss = F.cross_entropy(out.student_logits, y) + 3 * out.jacobian_loss
    return loss if out.student_features is None else loss + out.student_features.square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients, which are there, taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def step(matcher: JacobianMatching, x: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    loss = total(matcher, images() if x is None else x)
    loss.backward()
    return loss.detach(), gradients(matcher.student)


def reference(student: nn.Module, target: str = "window", x: Tensor | None = None, **options):
    """The same step of a copy, by a double backward."""
    return step(matching(copy.deepcopy(student), target, "autograd", **options), x)


def assert_same(got, expected) -> None:
    torch.testing.assert_close(got, expected, **EXACT)


# Backward, twice and in parts


@EVERY
def test_a_second_backward_gives_pytorchs_error(target, strategy):
    loss = matching(network(), target, strategy)(images(), LABELS).jacobian_loss
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@EVERY
def test_retain_graph_gives_the_same_gradients_again(target, strategy):
    student = network()
    expected = reference(student, target)
    loss = total(matching(student, target, strategy), images())
    for last in (False, True):
        loss.backward(retain_graph=not last)
        assert_same((loss.detach(), gradients(student)), expected)


@EVERY
def test_gradients_accumulate(target, strategy):
    student = network().eval()
    matcher = matching(student, target, strategy)
    both = [step(matcher, images(seed))[1] for seed in (1, 2)]
    for seed in (1, 2):
        total(matcher, images(seed)).backward()
    assert_same(gradients(student), {k: both[0][k] + both[1][k] for k in both[0]})


@EVERY
def test_two_steps_may_be_in_flight_at_once(target, strategy):
    student = network().eval()
    matcher = matching(student, target, strategy)
    apart = [step(matcher, images(seed))[1] for seed in (1, 2)]
    (total(matcher, images(1)) + total(matcher, images(2))).backward()
    assert_same(gradients(student), {k: apart[0][k] + apart[1][k] for k in apart[0]})


ONCE = r"fastjac.with_jacobian differentiates once; got a backward with create_graph=True\. "


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.eval().requires_grad_(False).conv.requires_grad_(),
        lambda s: s.head.requires_grad_(False),
        lambda s: s.body.register_module("1", nn.BatchNorm2d(3).double()),
    ],
    ids=["one parameter", "most parameters", "norms"],
)
@pytest.mark.parametrize("normalise", [False, True], ids=["plain", "normalised"])
@EVERY
def test_double_backward_raises_and_says_so(target, strategy, normalise, change):
    student = network(normalise=normalise)
    change(student)
    loss = matching(student, target, strategy)(images(), LABELS).jacobian_loss
    wanted = [p for p in student.parameters() if p.requires_grad]
    with pytest.raises(FastjacError, match=ONCE + "strategy='autograd' differentiates the model"):
        torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_second_derivative_of_other_outputs_raises_where_a_norm_has_none(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("fastjac.fusion.mode.native", lambda device: False)
    student = network()
    student.relu = nn.GELU()  # the BatchNorm is a chain of its own
    logits = matching(student)(images(), LABELS).student_logits
    with pytest.raises(
        FastjacError, match=r"fastjac's .*BatchNorm differentiates once; got .*'autograd"
    ):
        torch.autograd.grad(logits.sum(), student.conv.weight, create_graph=True)


def test_a_second_derivative_of_other_outputs_is_pytorchs_without_a_norm():
    student, plain, found = network(normalise=False), network(normalise=False), []
    student.relu, plain.relu = nn.GELU(), nn.GELU()
    for model, logits in ((student, matching(student)(images()).student_logits), (plain, None)):
        logits = model(images()) if logits is None else logits
        (grad,) = torch.autograd.grad(logits.square().sum(), model.conv.weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), list(model.parameters())))
    assert_same(*found)


def test_autograd_grad_gives_the_same_gradients():
    student = network()
    expected = reference(student)[1]
    loss = total(matching(student), images())
    assert_same(torch.autograd.grad(loss, list(student.parameters())), tuple(expected.values()))


def test_a_weighted_loss_scales_the_gradient():
    student = network().eval()
    matcher, grads = matching(student), []
    for weight in (1.0, -2.5):
        (weight * matcher(images()).jacobian_loss).backward()
        grads.append(gradients(student)["conv.weight"])
    assert grads[0].norm() > 0
    assert_same(grads[1], -2.5 * grads[0])


def test_gradient_with_respect_to_features_and_logits_taken_alone():
    student = network().eval()
    out = matching(student)(images(), LABELS)
    plain = network().eval()
    features = plain[:4](images())
    assert_same(out.student_features, features)
    for ours, theirs in ((out.student_features, features), (out.student_logits, plain(images()))):
        got = torch.autograd.grad(ours.square().sum(), student.conv.weight, retain_graph=True)
        assert_same(got, torch.autograd.grad(theirs.square().sum(), plain.conv.weight))


# Without a graph


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY
def test_evaluation_gives_the_same_loss_and_no_graph(target, strategy, training, context):
    student = network().train(training)
    expected = matching(copy.deepcopy(student), target, "autograd")(images(), LABELS)
    with context():
        out = matching(student, target, strategy)(images(), LABELS.clone())
    for name in ("jacobian_loss", "student_logits", "teacher_logits", "student_features"):
        value = getattr(out, name)
        if value is not None:
            assert not value.requires_grad
            assert_same(value.clone(), getattr(expected, name).detach())
    assert all(p.grad is None for p in student.parameters())


def test_a_step_after_an_evaluation_in_inference_mode():
    student = network()
    expected = reference(student)
    matcher = matching(student)
    with torch.inference_mode():
        matcher.eval()(images(), LABELS)
    assert_same(step(matcher.train()), expected)


@EVERY
def test_networks_built_in_inference_mode(target, strategy):
    plain = matching(network(), target, "autograd")
    expected = plain(images(), LABELS).jacobian_loss
    with torch.inference_mode():
        matcher = matching(network(), target, strategy)
        for _ in range(2):
            matcher.student.load_state_dict(network().state_dict())
            assert_same(matcher(images(), LABELS).jacobian_loss.clone(), expected.detach())
        assert all(p.is_inference() for p in matcher.parameters())
        assert_same(dict(matcher.student.named_buffers()), dict(plain.student.named_buffers()))
    matcher.student = network()  # the teacher's parameters are constants of a step outside
    assert_same(step(matcher), reference(network(), target))


@pytest.mark.parametrize("strategy", ["auto", "autograd"])
def test_inference_tensors_are_input_like_any(strategy):
    student = network()
    expected = input_jacobian(network(), images(), TARGETS["logit"], LABELS, strategy="autograd")
    with torch.inference_mode():
        x, y = images(), LABELS.clone()
        j = input_jacobian(student, x, TARGETS["logit"], y=y, strategy=strategy)
        assert x.is_inference()
    assert_same(j, expected)


# Copies


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
@EVERY
def test_copies(target, strategy, duplicate, used):
    matcher = matching(network(), target, strategy)
    if used:
        step(matcher)
    other = duplicate(matcher)
    expected = step(matcher)
    assert_same(step(other), expected)
    apart = {id(p) for p in matcher.parameters()}
    assert apart.isdisjoint(id(p) for p in other.parameters())
    other.student.head.weight.data.zero_()  # the copy runs the copy's student
    logits = other(images(), LABELS).student_logits
    assert_same(logits, other.student.head.bias.expand_as(logits))


def test_the_students_state_dict_is_its_own():
    student, untouched = network().eval(), network().eval()
    matcher = matching(student)
    step(matcher)
    assert_same(student.state_dict(), untouched.state_dict())
    assert list(student.state_dict()) == list(untouched.state_dict())
    assert {k.split(".")[0] for k in matcher.state_dict()} == {"student", "teacher"}


@EVERY
def test_load_state_dict_then_step(target, strategy):
    student, other = network(), network(3)
    matcher = matching(student, target, strategy)
    step(matcher)
    student.load_state_dict(other.state_dict())
    assert_same(step(matcher), reference(other, target))


def test_load_state_dict_with_assign_then_step():
    student, other = network(), network(3)
    matcher = matching(student)
    step(matcher)
    student.load_state_dict(other.state_dict(), assign=True)
    for p in student.parameters():
        p.requires_grad_()
    assert_same(step(matcher), reference(other))


# The student changes between steps


@EVERY
def test_train_and_eval_in_turn(target, strategy):
    student = network()
    matcher = matching(student, target, strategy)
    for training in (True, False, True, False):
        matcher.train(training)
        assert matcher.teacher.training is False
        assert_same(step(matcher), reference(student, target))
        reference_student = copy.deepcopy(student)
        reference_student(images())
        for ours, theirs in zip(student.buffers(), reference_student.buffers(), strict=True):
            assert training != torch.equal(ours, theirs)


@EVERY
def test_a_teacher_that_the_loop_puts_in_train_mode_stays_in_eval_mode(target, strategy):
    student = network()
    matcher = matching(student, target, strategy)
    matcher.teacher.train()
    assert_same(step(matcher), reference(student, target))
    assert not any(module.training for module in matcher.teacher.modules())


@EVERY
def test_a_replaced_submodule_is_run(target, strategy):
    student = network()
    matcher = matching(student, target, strategy)
    step(matcher)
    student.relu = nn.Tanh()
    student.body[0] = nn.Conv2d(3, 3, 5, padding=2).double()
    assert_same(step(matcher), reference(student, target))


def test_a_replaced_parameter_is_used():
    student = network()
    matcher = matching(student)
    step(matcher)
    student.conv.weight = nn.Parameter(torch.randn_like(student.conv.weight))
    assert_same(step(matcher), reference(student))


# Parameters


@pytest.mark.parametrize(
    "frozen",
    [
        *("conv.weight", "norm.weight", "norm.bias", "conv.", "norm.", "body.", "head.weight", ""),
        ("conv.", "norm."),  # the window's layer does not train, and what is behind it does
    ],
)
@EVERY
def test_frozen_parameters_get_no_gradient_and_leave_the_others_theirs(target, strategy, frozen):
    student = network()
    expected_loss, expected = reference(student, target)
    for name, p in student.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    loss = total(matching(student, target, strategy), images())
    assert loss.requires_grad == (frozen != "")
    if loss.requires_grad:
        loss.backward()
    assert_same(loss.detach(), expected_loss)
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert_same(p.grad, expected[name])
        else:
            assert p.grad is None


class Tied(nn.Module):
    """One convolution used three times, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.again.weight = self.pool[0].weight
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.pool(self.again(self.again(x)))).mean((2, 3)))


@EVERY
def test_tied_weights(target, strategy):
    student = Tied().double()
    assert_same(step(matching(student, target, strategy)), reference(student, target))


def test_hooks_of_parameters_and_tensors_fire():
    student = network().eval()
    expected = reference(student)[1]
    seen = {}
    for name, p in student.named_parameters():
        p.register_hook(lambda g, name=name: seen.update({name: g.clone()}))
    student.conv.bias.register_post_accumulate_grad_hook(
        lambda p: seen.update(accumulated=p.grad.clone())
    )
    out = matching(student)(images(), LABELS)
    out.student_features.register_hook(lambda g: seen.update(features=g.clone()))
    loss = F.cross_entropy(out.student_logits, LABELS) + 3 * out.jacobian_loss
    (loss + out.student_features.square().mean()).backward()
    assert_same(seen.pop("accumulated"), expected["conv.bias"])
    assert seen.pop("features").norm() > 0
    assert_same(seen, expected)


@pytest.mark.parametrize(
    "normalise",
    [
        lambda m: nn.utils.weight_norm(m),
        lambda m: nn.utils.spectral_norm(m),
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: nn.utils.parametrizations.spectral_norm(m),
        lambda m: nn.utils.parametrizations.orthogonal(m),
    ],
    ids=["weight_norm, hook", "spectral_norm, hook", "weight_norm", "spectral_norm", "orthogonal"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@EVERY
def test_normalised_weights(target, strategy, normalise):
    students = [network(), network()]
    for student in students:
        torch.manual_seed(1)
        normalise(student.conv)
        normalise(student.body[0])
        normalise(student.head)
    expected = step(matching(students[1], target, "autograd"))
    got = step(matching(students[0], target, strategy))
    assert_same(got, expected)
    assert any("weight_g" in k or "original" in k or "orig" in k for k in got[1])
    assert_same(students[0].state_dict(), students[1].state_dict())  # power iterations ran once


def test_a_flag_set_by_a_context_is_put_back():
    matcher = matching(network())
    step(matcher)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# Batches of other sizes, and other layouts


@EVERY
def test_batches_of_other_sizes_in_turn(target, strategy):
    student = network()
    matcher = matching(student, target, strategy)
    for batch in (3, 1, 2):
        y, x = LABELS[:batch], images(batch, batch)
        loss = total(matcher, x, y)
        expected = total(matching(copy.deepcopy(student), target, "autograd"), x, y)
        assert_same(loss, expected)


@EVERY
def test_channels_last(target, strategy):
    student = network()
    expected = reference(student, target)
    student.to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    assert_same(step(matching(student, target, strategy), x), expected)


# Low precision


def distance(got: tuple, expected: tuple) -> float:
    pairs = [(got[0], expected[0])] + [(got[1][k], expected[1][k]) for k in expected[1]]
    off = sum((a.double() - b).square().sum() for a, b in pairs)
    return float((off / sum(b.square().sum() for _, b in pairs)).sqrt())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY
def test_autocast_errs_at_most_twice_as_much_as_autograd(target, strategy, training):
    ours, theirs = [], []
    for seed in range(4):
        student, x = network(seed, width=6).train(training), images(seed)
        exact = reference(student, target, x)
        for errors, by in ((ours, strategy), (theirs, "autograd")):
            matcher = matching(copy.deepcopy(student).float(), target, by)
            matcher.teacher.float()
            with torch.autocast("cpu", torch.bfloat16):
                got = step(matcher, x.float())
            assert all(g.dtype == torch.float32 for g in got[1].values())
            errors.append(distance(got, exact))
    assert sum(theirs) > 1e-4
    assert sum(ours) <= 2 * sum(theirs)
    assert max(ours) < 0.5
