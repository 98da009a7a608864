"""DistributedDataParallel around a matcher: two processes, each with half of the batch."""

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac import AttentionWindow, JacobianMatching, LabelLogit

RANKS = 2
CASES = {
    "window, no norm": (AttentionWindow("pool"), "none", "frozen"),
    "window, norm in eval mode": (AttentionWindow("pool"), "eval", "frozen"),
    "window, norm in train mode": (AttentionWindow("pool"), "train", "frozen"),
    "logit, no norm": (LabelLogit(), "none", "frozen"),
    "logit, norm in train mode": (LabelLogit(), "train", "batch"),
}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)


def network(seed: int, norm: str) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 3, 3, padding=1),
            norm=nn.Identity() if norm == "none" else nn.BatchNorm2d(3),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            head=nn.Linear(192, 4),
        )
    ).double()


def matching(case: str) -> JacobianMatching:
    target, norm, batch_stats = CASES[case]
    matcher = JacobianMatching(network(0, norm), network(7, norm), target, batch_stats=batch_stats)
    return matcher.train(norm != "eval")


def batch() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return torch.rand(8, 3, 16, 16, generator=make).double(), torch.arange(8) % 4


def gradients(matcher: nn.Module, student: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The student's, and the loss."""
    out = matcher(x, y)
    loss = F.cross_entropy(out.student_logits, y) + out.jacobian_loss
    loss.backward()
    found = [p.grad for p in student.parameters()] + [loss.detach()]
    student.zero_grad(set_to_none=True)
    return found


def work(rank: int, folder: Path) -> None:
    """One process: two steps of each case on its half of the batch."""
    where = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    results = {}
    x, y = (t.chunk(RANKS)[rank] for t in batch())
    for case in CASES:
        matcher = matching(case)
        parallel = nn.parallel.DistributedDataParallel(matcher)
        results[case] = [gradients(parallel, matcher.student, x, y) for _ in range(2)]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network(0, "train"))
    try:
        JacobianMatching(converted, network(7, "none"))(x, y)
    except ValueError as err:
        results["synchronised"] = str(err)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two real processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=env, stderr=subprocess.PIPE)
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err.decode()
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_average_over_the_ranks(ranks, case):
    apart = []
    for x, y in zip(*(t.chunk(RANKS) for t in batch()), strict=True):
        matcher = matching(case)
        apart.append([gradients(matcher, matcher.student, x, y) for _ in range(2)])
    for rank, found in enumerate(ranks):
        for again in range(2):
            *grads, loss = found[case][again]
            expected = [sum(pair) / RANKS for pair in zip(*(a[again] for a in apart), strict=True)]
            torch.testing.assert_close(grads, expected[:-1], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(loss, apart[rank][again][-1], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("case", [c for c in CASES if "train" not in c])
def test_gradients_are_those_of_one_process_on_the_whole_batch(ranks, case):
    matcher = matching(case)
    *expected, loss = gradients(matcher, matcher.student, *batch())
    for found in ranks:
        torch.testing.assert_close(found[case][0][:-1], expected, rtol=1e-9, atol=1e-12)
    mean = sum(found[case][0][-1] for found in ranks) / RANKS
    torch.testing.assert_close(mean, loss, rtol=1e-9, atol=0.0)


def test_synchronised_batch_norm_is_an_error(ranks):
    """PyTorch's own, here on a CPU; test_unseen has the one of a device that it runs on."""
    for found in ranks:
        assert "SyncBatchNorm expected input tensor to be on GPU" in found["synchronised"]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
