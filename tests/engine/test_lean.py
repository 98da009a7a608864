"""Nothing outlives its use: no cycle, no leak, no graph of the backward."""

import gc
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastjac import (
    AttentionWindow,
    JacobianMatching,
    LabelLogit,
    Logits,
    fuse,
    input_jacobian,
    with_jacobian,
)
from fastjac.engine import Linearization, Tape
from fastjac.engine.call import Call
from fastjac.engine.crops import Crops
from fastjac.engine.hooks import nodes_behind
from fastjac.engine.rules import Rule
from fastjac.engine.sweeps import CropPlan
from fastjac.fusion.chains import Chain
from fastjac.fusion.mode import tensors_in

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
MAP = 2 * 4 * 24 * 24 * 8  # the bytes of the stem's maps


class Branching(nn.Module):
    """Its forward reads a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if x.sum() > 0 else x.sigmoid()


class Network(nn.Module):
    """``stem``, then a head with a call of every kind that keeps something."""

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
        left, right = (z * self.gate(z)).chunk(2, 1)
        z = self.rest(-torch.cat([left + 2 * right, left - right / 2], 1))
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


@pytest.fixture(scope="module", autouse=True)
def warm_up():
    """PyTorch's first calls under a dispatch mode make cycles, which hold what they were called with."""
    with Allocations():
        step(matching(WINDOW, "dense", "frozen"), images())


@pytest.fixture(autouse=True)
def no_collector(warm_up):
    """Reference counts alone free what is freed here."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Allocations(TorchDispatchMode):
    """The storages that operations make, held weakly; not a copy on write, which is the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = self._storages((args, kwargs))
        if func is torch.ops.aten._lazy_clone.default:
            assert torch._C._is_cow_tensor(out)
            given = self._storages(out)
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
    step(matcher, x)
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


@EVERY
def test_what_the_backward_has_read_dies_while_j_is_alive(target, strategy, batch_stats):
    model, x = Network(), images()
    options = {"strategy": strategy, "batch_stats": batch_stats}
    with Allocations() as allocations:
        out = with_jacobian(model, x, target, LABELS, **options)
        loss = out.output.square().mean() + out.jacobian.square().sum()
        before = allocations.alive()
        loss.backward(retain_graph=True)
        assert allocations.alive() >= before
        model.zero_grad(set_to_none=True)
        loss.backward()
        del loss
        found = (out.output, out.features, out.jacobian, *(p.grad for p in model.parameters()))
        held = sum(t.untyped_storage().nbytes() for t in found if t is not None)
        assert allocations.alive() <= held
        assert living() == []


def test_rows_are_swept_one_after_another():
    """K rows leave K times J to the backward, and peak at one sweep's maps beside them."""
    model, x, peaks, left = Network(), images(), [], []
    for indices in ([0], [0, 1], [0, 1, 2, 3]):
        with Allocations() as allocations:
            out = with_jacobian(model, x, Logits(indices), LABELS)
            left.append(allocations.alive())
            out.jacobian.square().sum().backward()
        model.zero_grad(set_to_none=True)
        peaks.append(allocations.peak)
    # One row keeps its cotangents; several sweep again in the backward, one at a time. A row more is
    # its J, and in the backward its part of J's gradient and of what makes it.
    assert left[2] - left[1] < 2 * (x.nbytes + MAP // 16)
    assert peaks[2] - peaks[1] < 2 * (2.5 * x.nbytes + MAP // 8)


@pytest.mark.parametrize(
    ("target", "strategy", "batch_stats", "cotangents", "working"),
    [
        (WINDOW, "local", "frozen", 1.1, 1.6),
        (WINDOW, "dense", "frozen", 5.2, 7.25),
        (WINDOW, "dense", "batch", 5.2, 7.5),
        (LabelLogit(), "auto", "frozen", 5.2, 7.0),
        (LabelLogit(), "auto", "batch", 5.2, 7.5),
    ],
    ids=["local", "dense", "dense-batch", "logit", "logit-batch"],
)
def test_what_a_forward_leaves_to_the_backward(target, strategy, batch_stats, cotangents, working):
    student, x = Network(), images()
    matcher = matching(target, strategy, batch_stats, student)
    step(matcher, x)
    with Allocations() as plain:
        logits = fuse(student)(x)  # the plain step, its chains as they are
        kept = plain.alive()
    with Allocations() as ours:
        out = matcher(x, LABELS)
        extra = ours.alive() - kept
        loss = out.student_logits.square().mean() + out.jacobian_loss
        loss.backward()
    assert kept > 5 * MAP
    # On maps: the cotangents of the stem's leaky ReLU, and of both norms (the convolutions' before the
    # norms are recomputed from these), 3; J and the loss's gradient in it, 2 of 3/4; of the teacher its
    # features, and the window's seed, or what lies behind the stem, at most 3/4. On crops, of less than
    # an eighth of a map each, as many, and the features.
    assert MAP // 4 < extra < cotangents * MAP
    # At its fullest, in the forward sweep: one cotangent is recomputed, one tangent goes in and one
    # comes out, while the first cotangents have gone. (With the forward sweep inside the forward, the
    # peaks of the step were 7.9, 15.0, 16.0, 15.6 and 17.6 maps.)
    assert kept < ours.peak <= kept + working * MAP
    del logits, out, loss


def test_on_crops_the_input_of_a_sigmoid_dies_with_the_forward():
    """Its autograd node keeps the output alone, and the crops are small."""
    stem = (nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid())
    model = nn.Sequential(nn.Sequential(*stem), nn.Flatten(), nn.Linear(4 * 24 * 24, 4)).double()
    x = images()
    with Allocations() as plain:
        logits = model(x)
        kept = plain.alive()
    with Allocations() as ours:
        out = with_jacobian(model, x, AttentionWindow("0", window=0.05), strategy="local")
        extra = ours.alive() - kept - out.jacobian.nbytes
    assert kept > 2 * MAP
    assert 0 < extra < MAP // 4
    del logits


KINDS = (Tape, Call, Rule, Linearization, CropPlan, Crops, Chain)
EARLIER: list[object] = []  # what other tests still hold: their errors, whose frames they keep


@pytest.fixture(autouse=True)
def what_was_there_before(no_collector):
    EARLIER[:] = [o for o in gc.get_objects() if issubclass(type(o), KINDS)]
    yield
    EARLIER.clear()


def living() -> list[str]:
    """The kinds of what the engine has noted since the test began."""
    earlier = {id(o) for o in EARLIER}
    found = (o for o in gc.get_objects() if id(o) not in earlier)
    return sorted({type(o).__name__ for o in found if issubclass(type(o), KINDS)})


@EVERY
def test_no_record_outlives_its_use(target, strategy, batch_stats):
    """The tape dies with the forward, the teacher's calls too; the student's, with the backward."""
    matcher, seen = matching(target, strategy, batch_stats), []
    matcher.student.head[1].register_forward_hook(lambda *_: seen.extend(living()))
    out = matcher(images(), LABELS)
    assert {"Tape", "Call", "Convolution"} <= set(seen)
    left = living()
    assert {"Linearization", "Call", "Convolution"} <= set(left)
    assert {"Tape", "Chain"}.isdisjoint(left)
    assert ("CropPlan" in left) == (strategy == "local")
    out.jacobian_loss.backward(retain_graph=True)
    assert living() == left
    out.jacobian_loss.backward()
    assert living() == []
    assert out.jacobian_loss.requires_grad


@EVERY
def test_an_evaluation_leaves_no_record(target, strategy, batch_stats):
    matcher = matching(target, strategy, batch_stats)
    with torch.no_grad():
        out = matcher(images(), LABELS)
        j = input_jacobian(matcher.student, images(), target, LABELS, strategy=strategy)
    assert living() == []
    assert not out.jacobian_loss.requires_grad
    assert j.norm() > 0


def resident() -> int:
    """Bytes of this process in memory, where the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


@pytest.mark.check
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
    assert bytes_[2] - bytes_[1] < 50 * MAP  # one map a step


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_only_autograd_makes_a_graph_of_the_backward(monkeypatch, batch_stats):
    """A rule may differentiate its own call twice; the graph of that holds no other."""
    lengths = []
    for name in ("grad", "backward"):
        original = getattr(torch.autograd, name)

        def spy(*args, original=original, **kwargs):
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            if given.get("create_graph"):
                outputs = tensors_in(given["outputs"])
                lengths.append(sum(1 for _ in nodes_behind([t.grad_fn for t in outputs])))
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, name, spy)
    found = {}
    for strategy in ("dense", "autograd"):
        lengths.clear()
        step(matching(LabelLogit(), strategy, batch_stats), images())
        found[strategy] = max(lengths, default=0)
    assert found["dense"] <= 4  # the call and its backward, and what both are differentiated in
    assert found["autograd"] > 10


class Rescaled(nn.Module):
    """What depends on x alone, then something trainable."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call, self.scale = call, nn.Parameter(torch.rand(3, 24, 24))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.sin(), self.scale).flatten(1)


@pytest.mark.parametrize(
    "call",
    [torch.mul, lambda z, w: z.lerp(w, 0.3), lambda z, w: torch.lerp(input=z, end=w, weight=0.3)],
)
def test_the_graph_of_a_loss_ends_at_the_parameters(call):
    model = Rescaled(call)
    out = with_jacobian(model, images(), LabelLogit(), LABELS)
    todo, leaves = [out.output.grad_fn, out.jacobian.grad_fn], []
    for node in todo:
        leaves += [node.variable] if hasattr(node, "variable") else []
        todo += [following for following, _ in node.next_functions if following is not None]
    assert all(leaf is model.scale for leaf in leaves)
    assert len(leaves) >= 2
