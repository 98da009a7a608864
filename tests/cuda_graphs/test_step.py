"""On a GPU: a step as a CUDA graph is the step, and what it cannot see is an error."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from every_layer import EveryLayer
from torch import Tensor, nn

import fastjac
from fastjac import AttentionWindow, FastjacError, LabelLogit, Projection, Scalar
from fastjac.graphs import GraphedStep

ON_CUDA = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
STEPS, WARMUP = 6, 2
TARGETS = {
    "label": LabelLogit(),
    "window": AttentionWindow("features.3", window=0.3),
    "projection": Projection(2),
    "loss": Scalar(lambda logits, y: F.cross_entropy(logits, y, reduction="none")),
}
OPTIMIZERS = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, rate, 0.9, fused=True),
    "adamw": lambda parameters, rate: torch.optim.AdamW(
        parameters, rate, capturable=True, foreach=True
    ),
}


@pytest.fixture(autouse=True)
def exact():
    """Kernels that give the same at every run, and round as little as float32 does."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    matmul.allow_tf32 = before


def batches(device: str, dtype: torch.dtype, side: int = 24) -> list[tuple[Tensor, Tensor]]:
    make = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        x = torch.rand(4, 3, side, side, generator=make, dtype=dtype).to(device)
        y = torch.randint(5, (4,), generator=make).to(device)
        assert x.device.type == y.device.type == device
        found.append((x.contiguous(memory_format=torch.channels_last), y))
    return found


class Steps:
    """Student, teacher, optimiser and scheduler, and the step with them."""

    def __init__(
        self, device: str, target, batch_stats: str, optimizer: str, dtype: torch.dtype, amp: bool
    ) -> None:
        torch.manual_seed(1)
        student, teacher = (EveryLayer().to(device, dtype) for _ in range(2))
        self.device, self.amp, self.student = device, amp, student
        self.matcher = fastjac.JacobianMatching(student, teacher, target, batch_stats=batch_stats)
        self.rate = torch.tensor(1e-2, device=device)
        self.optimizer = OPTIMIZERS[optimizer](student.parameters(), self.rate)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.3)

    def take(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            out = self.matcher(x, y)
        loss = F.cross_entropy(out.student_logits, y) + out.jacobian_loss
        loss = loss + fastjac.activation_match_loss(out.student_logits, out.teacher_logits)
        if out.student_features is not None:
            features = out.student_features, out.teacher_features
            loss = loss + fastjac.attention_match_loss(*features)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "jacobian": out.jacobian_loss}

    def run(self, take, given: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
        torch.manual_seed(2)  # the dropout's
        found = []
        for x, y in given:
            found.append({name: value.clone() for name, value in take(x, y).items()})
            self.scheduler.step()
        return found


def assert_same(got: Steps, wanted: Steps, results, expected, **tolerance) -> None:
    torch.testing.assert_close(results, expected, **tolerance)
    torch.testing.assert_close(got.student.state_dict(), wanted.student.state_dict(), **tolerance)
    torch.testing.assert_close(got.rate, wanted.rate)


@pytest.mark.parametrize(("batch_stats", "optimizer"), [("frozen", "sgd"), ("batch", "adamw")])
@pytest.mark.parametrize("target", TARGETS)
@ON_CUDA
def test_replays_are_the_eager_steps(device, target, batch_stats, optimizer):
    """Weights, buffers, dropout and a rate that changes: five replays after the warm-up."""
    given = batches(device, torch.float64)
    how = (device, TARGETS[target], batch_stats, optimizer, torch.float64, False)
    wanted, got = Steps(*how), Steps(*how)
    expected = wanted.run(wanted.take, given)
    step = fastjac.graphed(got.take, warmup=WARMUP)
    results = got.run(step, given)
    assert step.graph is not None
    assert not got.matcher._teacher_by_autograd
    assert wanted.rate < 1e-2 / 4
    assert_same(got, wanted, results, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@ON_CUDA
def test_trains_as_a_gpu_does(device, amp):
    given = batches(device, torch.float32)
    how = (device, TARGETS["window"], "frozen", "sgd", torch.float32, amp)
    wanted, got = Steps(*how), Steps(*how)
    expected = wanted.run(wanted.take, given)
    results = got.run(fastjac.graphed(got.take, warmup=WARMUP), given)
    assert_same(got, wanted, results, expected, rtol=2e-2 if amp else 1e-3, atol=1e-4)


@ON_CUDA
def test_a_penalty_and_a_fused_network(device):
    torch.manual_seed(1)
    nets = [EveryLayer().to(device).eval()]
    nets.append(copy.deepcopy(nets[0]))

    def stepper(model: nn.Module):
        fused = fastjac.fuse(model.features)

        def take(x: Tensor) -> Tensor:
            model.zero_grad()
            out = fastjac.with_jacobian(model, x, Scalar(lambda logits, y: logits[:, 0]))
            loss = fastjac.jacobian_norm_penalty(out.jacobian) + fused(x).square().mean()
            loss.backward()
            return loss

        return take

    eager, step = stepper(nets[0]), fastjac.graphed(stepper(nets[1]), warmup=2)
    for x, _ in batches(device, torch.float32):
        torch.testing.assert_close(step(x), eager(x).detach(), rtol=1e-4, atol=1e-6)
    grads = [[p.grad for p in net.parameters() if p.grad is not None] for net in nets]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@ON_CUDA
def test_evaluation_without_gradients(device):
    torch.manual_seed(1)
    matcher = fastjac.JacobianMatching(EveryLayer().to(device), EveryLayer().to(device)).eval()

    @torch.no_grad()
    def take(x: Tensor, y: Tensor) -> Tensor:
        return matcher(x, y).jacobian_loss

    step = fastjac.graphed(take, warmup=2)
    for x, y in batches(device, torch.float32):
        torch.testing.assert_close(step(x, y), take(x, y), rtol=1e-4, atol=1e-6)


@ON_CUDA
def test_random_numbers_differ_between_replays(device):
    step = fastjac.graphed(lambda x: F.dropout(x, 0.5), warmup=2)
    x = torch.ones(1000, device=device)
    found = [step(x).clone() for _ in range(4)]
    assert len({tuple(f.tolist()) for f in found}) == 4


@ON_CUDA
def test_an_older_step_may_be_collected_in_a_capture(device):
    x = torch.ones(3, device=device)

    def replayed() -> None:
        step = fastjac.graphed(lambda x: x + 1, warmup=2)
        for _ in range(4):
            step(x)
        step.itself = step  # freed by the collector alone

    def collects(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            for _ in range(1000):  # enough new objects for the collector to run, if it may
                made.append([[] for _ in range(10)])
        return x + 1

    made: list = []
    replayed()
    step = fastjac.graphed(collects, warmup=2)
    assert [step(x).tolist() for _ in range(4)] == [[2, 2, 2]] * 4


@ON_CUDA
def test_the_results_are_overwritten(device):
    step = fastjac.graphed(lambda x: {"twice": [2 * x]}, warmup=2)
    x = torch.ones(2, device=device)
    for _ in range(2):
        step(x)
    first = step(x)["twice"][0]
    assert first.tolist() == [2, 2]
    assert step(3 * x)["twice"][0] is first
    assert first.tolist() == [6, 6]


def weights(device: str) -> Tensor:
    return torch.ones(3, device=device, requires_grad=True)


WRONG = {
    "item": (
        lambda x: x * x.sum().item(),
        r"aten._local_scalar_dense reads .*, at .*test_step.py:",
    ),
    "mask": (lambda x: x[x > 0], "aten.index indexes with a mask"),
    "to the host": (lambda x: x.cpu(), "aten._to_copy copies between cpu and cuda"),
    "to the device": (lambda x: x + torch.ones(3).to(x.device), "aten._to_copy copies between"),
    "from a list": (lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device), "aten.lift_fr"),
    "torch's host": (lambda x: x * torch.rand(()), "draws random numbers on the host"),
    "Python's": (lambda x: x * random.random(), "draws random numbers on the host"),
}


@pytest.mark.parametrize("name", WRONG)
@ON_CUDA
def test_what_cannot_be_captured(device, name):
    function, message = WRONG[name]
    w, x = weights(device), torch.ones(3, device=device)
    optimizer = torch.optim.SGD([w], torch.tensor(1.0, device=device), fused=True)

    def take(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        w.sum().backward()
        optimizer.step()
        return function(x)

    step, before = fastjac.graphed(take, warmup=2), torch.cuda.current_stream()
    for _ in range(2):
        step(x)
    with pytest.raises(FastjacError, match=message):
        step(x)
    assert torch.cuda.current_stream() == before
    assert w.tolist() == [-1, -1, -1]  # after two steps; the third did not happen
    assert (x + 1).tolist() == [2, 2, 2]


BROKEN_OFF = """
import torch, fastjac
step = fastjac.graphed(lambda x: torch.cuda.synchronize() or x + 1)
x = torch.ones(3, device="cuda")
for _ in range(3):
    step(x)
try:
    step(x)
except fastjac.FastjacError as error:
    print(error)
print((x + 1).tolist(), torch.cuda.current_stream() == torch.cuda.default_stream())
"""


@ON_CUDA
def test_what_cuda_breaks_off(device):
    """In a process of its own, in which PyTorch captures no more."""
    run = subprocess.run(
        [sys.executable, "-c", BROKEN_OFF], capture_output=True, text=True, check=False
    )
    message, after = run.stdout.strip().splitlines()
    assert message.startswith("graphed: the step cannot be captured (")
    assert "captures no more in this process" in message
    assert after == "[2.0, 2.0, 2.0] True"
    assert run.returncode == 0, run.stderr


@ON_CUDA
def test_waits_in_a_backward(device):
    w = weights(device)
    w.register_hook(lambda gradient: gradient * gradient.sum().item())

    def take(x: Tensor) -> Tensor:
        (w * x).sum().backward()
        return x

    step, x = fastjac.graphed(take, warmup=2), torch.ones(3, device=device)
    for _ in range(2):
        step(x)
    with pytest.raises(FastjacError, match=r"aten\._local_scalar_dense"):
        step(x)


@ON_CUDA
def test_a_user_s_own_error_comes_through(device):
    def take(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("mine")
        return x

    step, x = fastjac.graphed(take, warmup=2), torch.ones(3, device=device)
    for _ in range(2):
        step(x)
    with pytest.raises(ValueError, match="mine"):
        step(x)


@ON_CUDA
def test_other_arguments(device):
    x = torch.ones(3, device=device)
    step = fastjac.graphed(lambda x, k=1: x * k, warmup=2)
    for _ in range(4):  # before and after the capture
        step(x, k=2)
        for other in (x[:2], x.double(), x.cpu()):
            with pytest.raises(FastjacError, match=r"expected float32 \[3\] on cuda:0.*got f"):
                step(other, k=2)
        with pytest.raises(
            FastjacError, match="argument 1: expected 2, as in the first call, got 3"
        ):
            step(x, k=3)
        with pytest.raises(FastjacError, match="of the structure"):
            step(x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda device: torch.ones(3), "expected the step's tensors on one GPU; got cpu"),
        (lambda device: weights(device), "an argument requires grad"),
        (lambda device: 3, "takes no tensor"),
    ],
)
@ON_CUDA
def test_first_arguments(device, wrong, message):
    with pytest.raises(FastjacError, match=message):
        fastjac.graphed(lambda x: x)(wrong(device))


def test_an_array_of_numpy_is_an_error():
    """Its values may change, unseen by a replay. Said before a GPU is needed."""
    array = pytest.importorskip("numpy").ones(3)
    with pytest.raises(FastjacError, match="argument 1: expected a tensor on a GPU, got ndarray"):
        GraphedStep(lambda x, a: x, 2)(torch.ones(3), array)


@ON_CUDA
def test_a_rate_that_a_replay_does_not_see(device):
    w, x = weights(device), torch.ones(3, device=device)
    optimizer = torch.optim.SGD([w], 0.1, foreach=True)

    def take(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        (w * x).sum().backward()
        optimizer.step()
        return w

    step = fastjac.graphed(take, warmup=2)
    for _ in range(3):  # one that does not change is right
        step(x)
    torch.testing.assert_close(w.detach(), torch.full_like(x, 0.7))
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(FastjacError, match=r"lr of SGD was 0\.1 in the capture and is now 0\.01"):
        step(x)


@ON_CUDA
def test_an_optimiser_s_loaded_state(device):
    w, x = weights(device), torch.ones(3, device=device)
    rate = torch.tensor(0.1, device=device)
    optimizer = torch.optim.Adam([w], rate, capturable=True)

    def take(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        (w * x).sum().backward()
        optimizer.step()
        return w

    step = fastjac.graphed(take, warmup=2)
    for _ in range(3):
        step(x)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(
        FastjacError, match=r"lr of Adam was a tensor .* another tensor, .* call graphed again"
    ):
        step(x)


@ON_CUDA
def test_an_optimiser_that_is_not_capturable(device):
    w, x = weights(device), torch.ones(3, device=device)
    optimizer = torch.optim.Adam([w], 0.1)

    def take(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        (w * x).sum().backward()
        optimizer.step()
        return w

    step = fastjac.graphed(take, warmup=2)
    for _ in range(2):
        step(x)
    with pytest.raises(FastjacError, match=r"cannot be captured .*capturable is False"):
        step(x)


@ON_CUDA
def test_a_window_at_a_given_position(device):
    """On a GPU a position is checked there, so that a step with one can be captured."""
    torch.manual_seed(1)
    model = EveryLayer().to(device).eval()

    @torch.no_grad()
    def take(x: Tensor, position: Tensor) -> Tensor:
        target = TARGETS["window"].at(position)
        return fastjac.with_jacobian(model, x, target).jacobian

    step = fastjac.graphed(take, warmup=2)
    for i, (x, _) in enumerate(batches(device, torch.float32)):
        position = torch.full((4, 2), i, device=device)
        torch.testing.assert_close(step(x, position), take(x, position), rtol=1e-4, atol=1e-6)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FastjacError, match=r"graphed needs a GPU: .*; call the step itself"):
        fastjac.graphed(lambda x: x)


def test_wrong_options():
    with pytest.raises(FastjacError, match="step must be callable; got int"):
        fastjac.graphed(3)
    with pytest.raises(FastjacError, match=r"warmup must be an int, at least 2 .*; got 1"):
        fastjac.graphed(lambda x: x, warmup=1)
