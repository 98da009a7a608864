"""A step with Jacobians whose teacher is cached, against one without them that runs its teacher.

    python -m benchmarks.teacher_cache

The trainer's loss of a VGG-4 taught by a VGG-9, forward and backward: ``plain`` with the term of the
activations alone, its teacher run at every step; ``cached`` with the Jacobians of the label's logit as
well, what the teacher gives kept in memory since the warm-up. In turn in one process, whose allocator
keeps its pages as the trainer's does. Before, the loss must be the same with and without the cache. One
line of JSON: seconds (medians), and the median ratio round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import measuring
from fastjac.data import ImageData
from fastjac.models import ModelSpec, create_model
from fastjac.train.memory import keep_pages
from fastjac.train.objective import Distillation
from fastjac.train.options import StudentOptions

MODULE = "benchmarks.teacher_cache"
CLASSES = 100


def objective(data: ImageData, **options: object) -> Distillation:
    """The loss of the trainer, on new networks that are always the same."""
    torch.manual_seed(1)
    student, teacher = (
        create_model(ModelSpec(name, CLASSES)).to(memory_format=torch.channels_last)
        for name in ("vgg4", "vgg9")
    )
    chosen = StudentOptions(epochs=100, activations=1.0, **options)
    return Distillation(chosen, student.train(), teacher, data, CLASSES)


def step(loss: Distillation, x: Tensor, y: Tensor) -> float:
    """The seconds of a forward and a backward."""
    start = time.perf_counter()
    loss.zero_grad()
    loss(x, y).loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write every figure to this file, too")
    args = parser.parse_args()
    args.device = "cpu"
    keep_pages()
    torch.manual_seed(0)
    x, y = torch.rand(args.batch, 3, args.size, args.size), torch.randint(CLASSES, (args.batch,))
    images = TensorDataset(x, y)
    names = [str(k) for k in range(CLASSES)]
    size = args.size
    data = ImageData("noise", images, images, y.tolist(), names, 3, size, (0.0,) * 3, (1.0,) * 3)
    x = x.contiguous(memory_format=torch.channels_last)
    plain = objective(data, teacher_cache="off")
    cached = objective(data, jacobians=1.0, teacher_cache="auto")
    expected = objective(data, jacobians=1.0, teacher_cache="off")(x, y).loss
    torch.testing.assert_close(cached(x, y).loss, expected, rtol=1e-5, atol=0)
    for loss in (plain, cached) * 2:
        step(loss, x, y)
    seconds = [(step(plain, x, y), step(cached, x, y)) for _ in range(args.rounds)]
    found = {
        "plain_s": statistics.median(a for a, _ in seconds),
        "cached_s": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(b / a for a, b in seconds),
    }
    print(json.dumps(found))
    measuring.write_json(args, MODULE, [found])


if __name__ == "__main__":
    main()
