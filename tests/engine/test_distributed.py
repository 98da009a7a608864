"""DistributedDataParallel and SyncBatchNorm: real processes, each with its part of one batch."""

import os
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastjac import AttentionWindow, FastjacError, JacobianMatching, LabelLogit, with_jacobian
from fastjac.engine import synchronised_batch_norms
from fastjac.targets import Logits

WINDOW, LOGIT = AttentionWindow("pool"), LabelLogit()
EVEN = {2: (4, 4), 4: (2, 2, 2, 2)}
UNEVEN = {2: (5, 3), 4: (3, 1, 1, 3)}

# One process of the tests starts the ranks.
pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="PyTorch was built without gloo",
    ),
]


@dataclass(frozen=True)
class Case:
    target: object
    norm: str  # "none", "eval", "train" (of each process its own), "synchronised"
    batch_stats: str = "frozen"
    strategy: str = "auto"
    around: str = "matcher"
    unused: bool = False
    uneven: bool = False

    def sizes(self, ranks: int) -> tuple[int, ...]:
        return (UNEVEN if self.uneven else EVEN)[ranks]


CASES = {
    "window": Case(WINDOW, "none"),
    "window, eval": Case(WINDOW, "eval", unused=True),
    "window, synchronised": Case(WINDOW, "synchronised"),
    "window, synchronised, local, uneven": Case(
        WINDOW, "synchronised", strategy="local", uneven=True
    ),
    "window, synchronised, batch": Case(WINDOW, "synchronised", "batch", unused=True),
    "window, around the student": Case(WINDOW, "synchronised", around="student"),
    "logit": Case(LOGIT, "none", around="student", unused=True),
    "logit, synchronised": Case(LOGIT, "synchronised", unused=True),
    "logit, synchronised, batch, uneven": Case(LOGIT, "synchronised", "batch", uneven=True),
    "logit, around the student": Case(
        LOGIT, "synchronised", "batch", around="student", unused=True
    ),
    "window, without logits": Case(WINDOW, "none", around="loss", unused=True),
    "logit, without logits": Case(LOGIT, "none", around="loss", unused=True),
}
SHARDED = {  # layer by layer, and whether the parameters are kept after the forward
    "window, sharded": (WINDOW, True),
    "logit, sharded": (LOGIT, True),
    "freed": (LOGIT, False),
}
OWN = {
    "window, own statistics": Case(WINDOW, "train"),
    "logit, own statistics": Case(LOGIT, "train", "batch", around="student"),
}


def network(seed: int, norm: str) -> nn.Sequential:
    torch.manual_seed(seed)
    norms = [nn.Identity() if norm == "none" else nn.BatchNorm2d(c) for c in (3, 5)]
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 3, 3, padding=1),
            norm=norms[0],
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(3, 5, 3, 2, 1),
            norm2=norms[1],
            act=nn.Tanh(),
            flat=nn.Flatten(),
            head=nn.Linear(80, 4),
        )
    ).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def batch() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return torch.rand(8, 3, 16, 16, generator=make).double(), torch.arange(8) % 4


def synchronise(model: nn.Sequential) -> nn.Sequential:
    """Convert it, where DistributedDataParallel has not to see: it refuses a SyncBatchNorm on a CPU."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert isinstance(model.norm, nn.SyncBatchNorm)
    return model


class Alone(nn.Module):
    """The Jacobian term, as a module that returns it and no logits."""

    def __init__(self, matcher: JacobianMatching) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.matcher(x, y).jacobian_loss


def gradients(
    case: Case, x: Tensor, y: Tensor, weight: float, wrap: Callable = lambda module, **_: module
) -> dict[str, Tensor]:
    """The student's, its statistics, and the loss, of the second of two steps."""
    student = network(0, case.norm).train(case.norm != "eval")
    target = case.target
    if case.around == "student":
        model = wrap(student, find_unused_parameters=case.unused)
        if model is not student and target is WINDOW:
            target = AttentionWindow("module.pool", teacher_layer="pool")
        matcher = JacobianMatching(
            model, network(7, "none"), target, batch_stats=case.batch_stats, strategy=case.strategy
        )
    else:
        matcher = JacobianMatching(
            student,
            network(7, "none"),
            target,
            batch_stats=case.batch_stats,
            strategy=case.strategy,
        )
        matcher.train(case.norm != "eval")
        if case.around == "loss":
            matcher = Alone(matcher)
        matcher = wrap(matcher, find_unused_parameters=case.unused)
    if case.norm in ("synchronised", "eval") and wrap is DistributedDataParallel:
        synchronise(student)
    for _ in range(2):
        student.zero_grad(set_to_none=True)
        out = matcher(x, y)
        if case.around == "loss":
            loss = weight * out
        else:
            loss = F.cross_entropy(out.student_logits, y, reduction="sum") / max(len(y), 1)
            loss = weight * (loss + out.jacobian_loss)
        loss.backward()
    found = {name: p.grad for name, p in student.named_parameters()}
    return found | {"loss": loss.detach()} | dict(student.named_buffers())


def work(rank: int, ranks: int, folder: Path) -> None:
    """One process: each case on its part of the batch."""
    store = dist.FileStore(str(folder / "meeting"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    results = {}
    for name, case in (CASES | OWN).items():
        x, y = (t.split(case.sizes(ranks))[rank] for t in batch())
        weight = ranks * len(x) / 8
        results[name] = gradients(case, x, y, weight, DistributedDataParallel)
    if ranks == 2:
        x, y = (t.chunk(ranks)[rank] for t in batch())
        results["half"] = penalised(x, [1.0, 4096.0][rank], torch.float16, synchronised=True)
        results["plain"] = plain(*(t.split((8, 0))[rank] for t in batch()))
        results["checkpointed"] = refusal(checkpointed, x)
        results["twice"] = refusal(differentiated_twice, x)
        results["groups"] = refusal(of_two_groups, x)
        for name, (target, kept) in SHARDED.items():
            results[name] = sharded(target, kept, x, y)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def penalised(
    x: Tensor, weights: float | Tensor, dtype: torch.dtype, synchronised: bool = False
) -> dict[str, Tensor]:
    """Gradients of a mean squared norm of several J of each sample, by weights of the samples."""
    student = network(0, "train").to(dtype)
    if synchronised:
        synchronise(student)
    out = with_jacobian(student, x.to(dtype), Logits([0, 2]))
    (weights * out.jacobian.double().square().flatten(1).sum(1)).mean().backward()
    found = {name: p.grad.double() for name, p in student.named_parameters() if p.grad is not None}
    if synchronised:
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= 2
    return found


def plain(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A step without a Jacobian, where one process has no image."""
    student = network(0, "train")
    parallel = DistributedDataParallel(student)
    synchronise(student)
    with synchronised_batch_norms():
        loss = F.cross_entropy(parallel(x), y, reduction="sum") / 4
    loss.backward()
    try:
        student(x)
        raise AssertionError("PyTorch's own forward runs on CPUs")
    except ValueError:
        return {name: p.grad for name, p in student.named_parameters()}


def sharded(target: object, kept: bool, x: Tensor, y: Tensor) -> dict[str, Tensor] | str:
    """Gradients of the second of two steps under ``fully_shard``, or the error."""
    student = network(0, "none")
    matcher = JacobianMatching(student, network(7, "none"), target)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (student.conv, student.conv2, student.head):
        fully_shard(layer, mesh=mesh, reshard_after_forward=not kept)
    fully_shard(matcher, mesh=mesh)
    try:
        for _ in range(2):
            student.zero_grad()
            out = matcher(x, y)
            (F.cross_entropy(out.student_logits, y) + out.jacobian_loss).backward()
    except FastjacError as error:
        return str(error)
    return {name: p.grad.full_tensor() for name, p in student.named_parameters()}


def refusal(run: Callable[[Tensor], object], x: Tensor) -> str:
    """The text of the error that ``run(x)`` raises."""
    try:
        run(x)
    except FastjacError as error:
        return str(error)
    return ""


def checkpointed(x: Tensor) -> None:
    model = synchronise(network(0, "train"))
    part = nn.Sequential(model.conv, model.norm)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False).mean((2, 3))

    with_jacobian(Checkpointed(), x, LOGIT, torch.zeros(len(x), dtype=torch.int64))


def differentiated_twice(x: Tensor) -> None:
    student = synchronise(network(0, "train"))
    with synchronised_batch_norms():
        y = student(x)
    torch.autograd.grad(y.square().sum(), student.conv.weight, create_graph=True)


def of_two_groups(x: Tensor) -> None:
    norms = nn.SyncBatchNorm(4), nn.SyncBatchNorm(4, process_group=dist.new_group([0, 1]))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.AdaptiveAvgPool2d(1), nn.Flatten()).half()
    with_jacobian(model, x.half(), Logits([0])).jacobian.sum().backward()


def run_ranks(ranks: int, folder: Path) -> list[dict]:
    """What each of so many real processes found."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder)], env=env, stderr=subprocess.PIPE
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err.decode()
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, list[dict]]:
    return {count: run_ranks(count, tmp_path_factory.mktemp("ranks")) for count in (2, 4)}


@pytest.fixture(params=[2, 4])
def ranks(request, runs) -> list[dict]:
    return runs[request.param]


@pytest.fixture
def two(runs) -> list[dict]:
    return runs[2]


@pytest.fixture(scope="module")
def joint() -> dict[str, dict[str, Tensor]]:
    """Each case in one process, on the whole batch."""
    return {name: gradients(case, *batch(), 1.0) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process_on_the_joint_batch(ranks, joint, name):
    expected = dict(joint[name])
    loss = expected.pop("loss")
    for found in ranks:
        for key, value in expected.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-9, atol=1e-12, msg=key)
    mean = sum(found[name]["loss"] for found in ranks) / len(ranks)
    torch.testing.assert_close(mean, loss, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", OWN)
def test_gradients_are_the_average_over_the_ranks(ranks, name):
    case, count = OWN[name], len(ranks)
    parts = zip(*(t.split(case.sizes(count)) for t in batch()), strict=True)
    apart = [gradients(case, x, y, 1.0) for x, y in parts]
    for rank, found in enumerate(ranks):
        for key, _ in network(0, case.norm).named_parameters():
            mean = sum(each[key] for each in apart) / count
            torch.testing.assert_close(found[name][key], mean, rtol=1e-9, atol=1e-12, msg=key)
        torch.testing.assert_close(found[name]["loss"], apart[rank]["loss"], rtol=1e-9, atol=0.0)


def test_float16_is_scaled_alike_on_all_ranks(two):
    """v differs 4096-fold between them: sums over ranks of tangents scaled apart would be wrong."""
    weights = torch.tensor([1.0, 4096.0]).repeat_interleave(4)
    expected = penalised(batch()[0], weights, torch.float64)
    for found in two:
        assert found["half"].keys() == expected.keys()
        for key, value in expected.items():
            if key not in ("conv.bias", "conv2.bias"):  # which the norms take away again
                assert (found["half"][key] - value).norm() < 0.03 * value.norm(), key


def test_a_step_without_a_jacobian(two):
    student = network(0, "train")
    x, y = batch()
    F.cross_entropy(student(x), y).backward()
    for found in two:
        for key, parameter in student.named_parameters():
            torch.testing.assert_close(found["plain"][key], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, (_, kept) in SHARDED.items() if kept])
def test_gradients_under_fully_shard(two, joint, name):
    expected = joint[name.replace(", sharded", "")]
    for found in two:
        for key, value in found[name].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=key)


def test_parameters_that_fully_shard_frees_are_an_error(two):
    for found in two:
        assert "was freed after the forward" in found["freed"]
        assert "expected reshard_after_forward=False" in found["freed"]


def test_in_a_checkpoint_it_is_an_error(two):
    for found in two:
        assert "SyncBatchNorm in train mode under torch.utils.checkpoint" in found["checkpointed"]


def test_a_second_derivative_is_an_error(two):
    for found in two:
        assert (
            "SyncBatchNorm differentiates once; got a backward with create_graph=True"
            in (found["twice"])
        )


def test_half_precision_over_two_groups_is_an_error(two):
    for found in two:
        assert "float16 with SyncBatchNorms of different process groups" in found["groups"]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
