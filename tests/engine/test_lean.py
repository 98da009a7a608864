"""Nothing outlives its use: no cycle, no leak, no graph of a backward."""

import gc
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastjac import AttentionWindow, JacobianMatching, LabelLogit, input_jacobian
from fastjac.engine.crops import Crops
from fastjac.engine.forward import Tape
from fastjac.engine.pullback import Frame, Pulled
from fastjac.engine.record import Record, Sink

WINDOW = AttentionWindow("stem")
EVERY = pytest.mark.parametrize(
    ("target", "strategy", "batch_stats"),
    [
        (WINDOW, "local", "frozen"),
        (WINDOW, "dense", "frozen"),
        (WINDOW, "dense", "batch"),
        (LabelLogit(), "auto", "frozen"),
        (LabelLogit(), "auto", "batch"),
    ],
    ids=["local", "dense", "dense-batch", "logit", "logit-batch"],
)
LABELS = torch.tensor([0, 1])


class Branching(nn.Module):
    """One node: no trace follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if x.sum() > 0 else x.sigmoid()


class Network(nn.Module):
    """``stem``, then a head with a node of every kind that keeps something."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
            *(nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        self.rest = nn.Sequential(
            *(nn.GroupNorm(2, width), nn.AvgPool2d(2), nn.Dropout(0.2), nn.ReLU(inplace=True)),
            *(Branching(), nn.Identity()),
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(width, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        half = (z * self.gate(z)).chunk(2, 1)  # unpacked, torch.fx's frames would make cycles
        z = self.rest(-torch.cat([half[0] + 2 * half[1], half[0] - half[1] / 2], 1))
        return self.head(self.norm(z.mean((2, 3))))


def images(side: int = 24) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()


def matching(target, strategy, batch_stats, student=None) -> JacobianMatching:
    student = student or Network()
    return JacobianMatching(student, Network(7), target, strategy=strategy, batch_stats=batch_stats)


def step(matcher: JacobianMatching, x: Tensor) -> None:
    out = matcher(x, LABELS)
    (out.student_logits.square().mean() + out.jacobian_loss).backward()
    matcher.zero_grad(set_to_none=True)


@pytest.fixture(autouse=True)
def no_collector():
    """Reference counts alone free what is freed here."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Allocations(TorchDispatchMode):
    """The storages that operations make, held weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = self._storages((args, kwargs))
        for storage, size in self._storages(out).items():
            if storage not in given:  # neither a view nor in place
                self.made[storage] = size
        self.peak = max(self.peak, self.alive())
        return out

    @staticmethod
    def _storages(values: object) -> dict[StorageWeakRef, int]:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        return {StorageWeakRef(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}

    def alive(self) -> int:
        return sum(n for storage, n in self.made.items() if not storage.expired())


@EVERY
def test_every_tensor_of_a_step_dies_with_it(target, strategy, batch_stats):
    matcher, x = matching(target, strategy, batch_stats), images()
    step(matcher, x)  # traces
    with Allocations() as allocations:
        out = matcher(x, LABELS)
        loss = out.student_logits.square().mean() + out.jacobian_loss
        assert allocations.alive() > 0
        loss.backward()
        del out, loss
        grads = sum(p.grad.untyped_storage().nbytes() for p in matcher.student.parameters())
        assert 0 < allocations.alive() <= grads
        matcher.zero_grad(set_to_none=True)
    assert len(allocations.made) > 100
    assert allocations.alive() == 0


def test_every_tensor_of_a_jacobian_dies_with_it():
    model, x = Network(), images()
    with Allocations() as allocations:
        j = input_jacobian(model, x, WINDOW)
        assert allocations.alive() == j.nbytes
        del j
    assert allocations.alive() == 0


def test_a_step_without_backward_leaves_nothing_either():
    matcher, x = matching(WINDOW, "auto", "frozen"), images()
    step(matcher, x)
    with Allocations() as allocations:
        matcher(x, LABELS)
    assert allocations.peak > allocations.alive() == 0


@pytest.mark.parametrize(
    ("strategy", "batch_stats"), [("local", "frozen"), ("dense", "frozen"), ("dense", "batch")]
)
def test_what_a_forward_leaves_to_the_backward(strategy, batch_stats):
    student, x = Network(), images()
    matcher = matching(WINDOW, strategy, batch_stats, student)
    step(matcher, x)
    with Allocations() as plain:
        program = matcher._student.program(WINDOW.layer)  # the plain step, its chains as they are
        logits = program.run(x)
        kept = plain.alive()
    parameters = sum(p.nbytes for p in student.parameters())
    full_map = 2 * 4 * 24 * 24 * 8
    with Allocations() as ours:
        out = matcher(x, LABELS)
        extra = ours.alive() - kept
    assert kept > 5 * full_map
    # Of the Jacobian's passes: a gradient for each parameter, the curvature of the features (a
    # fourth of a map), the teacher's outputs (as large), and with batch statistics that of each
    # BatchNorm's input.
    allowed = parameters + full_map // 2 + (2 * full_map if batch_stats == "batch" else 0)
    assert parameters < extra < allowed + full_map // 8
    # At its fullest, on maps: the cotangents that the pushforward reads (of three convolutions and two
    # norms), and what the node at hand works with.
    working = {"local": 2, "dense": 5 + (5 if batch_stats == "batch" else 4)}[strategy] * full_map
    assert ours.alive() < ours.peak <= kept + working
    del logits, out


@EVERY
def test_no_record_outlives_the_forward(target, strategy, batch_stats):
    kinds = (Record, Tape, Pulled, Frame, Crops, Sink)

    def living() -> list[str]:
        return sorted({type(o).__name__ for o in gc.get_objects() if issubclass(type(o), kinds)})

    matcher, seen = matching(target, strategy, batch_stats), []
    matcher.student.head[1].register_forward_hook(lambda *_: seen.extend(living()))
    out = matcher(images(), LABELS)
    assert "Record" in seen
    assert living() == []
    assert out.jacobian_loss.requires_grad


def resident() -> int:
    """Bytes of this process in memory, where the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


@EVERY
def test_memory_after_many_steps_is_that_after_five(target, strategy, batch_stats):
    matcher, x = matching(target, strategy, batch_stats), images()
    counts, bytes_ = [], []
    for i in range(65):
        step(matcher, x)
        if i in (4, 14, 64):
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
            bytes_.append(resident() if i > 4 else 0)
    assert counts[0] == counts[1] == counts[2] > 0
    one_map = 2 * 4 * 24 * 24 * 8
    assert bytes_[2] - bytes_[1] < 50 * one_map  # one map a step


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_only_autograd_makes_a_graph_of_a_backward(monkeypatch, batch_stats):
    asked = []
    for name in ("grad", "backward"):
        original = getattr(torch.autograd, name)

        def spy(*args, original=original, **kwargs):
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            asked.append(bool(given.get("create_graph")))
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, name, spy)
    for strategy, expected in (("dense", {False}), ("autograd", {False, True})):
        asked.clear()
        step(matching(LabelLogit(), strategy, batch_stats), images())
        assert set(asked) == expected
