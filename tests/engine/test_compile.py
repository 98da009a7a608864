"""``torch.compile`` of a training step that holds fastjac: an eager region, with eager's gradients."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from agreement import seed_all
from torch import Tensor, nn
from torch._dynamo import eval_frame

from fastjac import (
    AttentionWindow,
    JacobianMatching,
    LabelLogit,
    Logits,
    fuse,
    input_jacobian,
    jacobian_norm_penalty,
    with_jacobian,
)
from fastjac.fusion.mode import eager_regions

LABELS = torch.tensor([0, 3, 1])
TARGETS = {
    "logit": LabelLogit(),
    "window": AttentionWindow("3", window=0.4),
    "logits": Logits([0, 2]),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(seed: int = 0) -> nn.Sequential:
    seed_all(seed)
    stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(
        *stem, nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5)
    ).double()


def images(seed: int = 3) -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def matching_step(student: nn.Module, target):
    matcher = JacobianMatching(student, network(7), target, batch_stats="batch")

    def step(x: Tensor, y: Tensor) -> Tensor:
        out = matcher(x.sin() + 1, y)
        return F.cross_entropy(out.student_logits, y) + 2 * out.jacobian_loss

    return step


def penalty_step(student: nn.Module, target):
    def step(x: Tensor, y: Tensor) -> Tensor:
        out = with_jacobian(student, x.sin() + 1, target, y)
        return F.cross_entropy(out.output, y) + jacobian_norm_penalty(out.jacobian) * 0.5

    return step


STEPS = {"matcher": matching_step, "with_jacobian": penalty_step}
CASES = [(s, t) for s in STEPS for t in TARGETS]


def run(make, target, compiled: bool) -> list[Tensor]:
    student = network()
    step = make(student, TARGETS[target])
    if compiled:
        step = torch.compile(step, backend="aot_eager")
    found = []
    for seed in (3, 4):
        loss = step(images(seed), LABELS)
        student.zero_grad()
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
        found += [loss.detach(), *grads]
    return found + list(student.buffers())


@pytest.mark.parametrize(("step", "target"), CASES)
def test_gradients_are_eagers(step, target):
    expected = run(STEPS[step], target, False)
    torch.testing.assert_close(run(STEPS[step], target, True), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
def test_a_full_graph_is_refused(step):
    compiled = torch.compile(
        STEPS[step](network(), LabelLogit()), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match="fastjac runs eagerly"):
        compiled(images(), LABELS)


def test_a_compiled_input_jacobian():
    model = network().eval()
    expected = input_jacobian(model, images(), LabelLogit(), LABELS)
    compiled = torch.compile(
        lambda x: input_jacobian(model, x, LabelLogit(), LABELS) * 2, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(images()), 2 * expected, rtol=1e-12, atol=1e-12)
    whole = torch.compile(
        lambda x: input_jacobian(model, x, LabelLogit(), LABELS), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="fastjac runs eagerly"):
        whole(images())


def test_a_compiled_matcher_as_a_module():
    student = network()
    matcher = torch.compile(
        JacobianMatching(student, network(7), LabelLogit()), backend="aot_eager"
    )
    plain = network()
    expected = JacobianMatching(plain, network(7), LabelLogit())(images(), LABELS).jacobian_loss
    got = matcher(images(), LABELS).jacobian_loss
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for loss in (got, expected):
        loss.backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("place", [slice(0, 4), slice(4, 6), slice(None)])
def test_a_compiled_part_of_the_student(place, backend):
    """In the Jacobian's way: its own Python is run and recorded."""
    grads = []
    for compiled in (False, True):
        student = network()
        part = student[place]
        wrapped = torch.compile(part, backend=backend) if compiled else part
        before, after = student[: place.start or 0], student[place.stop or len(student) :]
        model = nn.Sequential(*before, wrapped, *after)
        out = with_jacobian(model, images(), LabelLogit(), LABELS)
        out.jacobian.square().sum().backward()
        grads.append(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
        )
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_part_that_was_compiled_before_the_step(backend):
    student, plain = network(), network()
    wrapped = nn.Sequential(torch.compile(student[:4], backend=backend), *student[4:])
    for model in (wrapped, plain):
        model(images()).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        out = with_jacobian(model, images(), LabelLogit(), LABELS)
        out.jacobian.square().sum().backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_threads_that_leave_in_another_order_put_the_compiler_back():
    """The compiler's stance is the process's: the first that enters sets it, the last puts it back."""
    inside, left = [threading.Event(), threading.Event()], threading.Event()

    def enter_first() -> None:
        with eager_regions():
            inside[0].set()
            inside[1].wait(60)
        left.set()

    def leave_last() -> None:
        inside[0].wait(60)
        with eager_regions():
            inside[1].set()
            left.wait(60)

    before = eval_frame._stance
    with ThreadPoolExecutor(2) as pool:
        for run in [pool.submit(enter_first), pool.submit(leave_last)]:
            run.result(60)
    assert eval_frame._stance == before


@pytest.mark.parametrize("fused", [False, True], ids=["with_jacobian", "fuse"])
def test_compiled_autograd_runs_a_step(fused):
    """It frees what a fused node's backward would read."""

    def gradients(compile_step: bool) -> list[Tensor]:
        model = network()
        run = fuse(model) if fused else model

        def step() -> None:
            if fused:
                run(images()).square().sum().backward()
                return
            out = with_jacobian(model, images(), LabelLogit(), LABELS)
            (F.cross_entropy(out.output, LABELS) + out.jacobian.square().sum()).backward()

        with torch._dynamo.config.patch(compiled_autograd=compile_step):
            (torch.compile(step, backend="eager") if compile_step else step)()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-9, atol=1e-12)
