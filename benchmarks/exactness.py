"""Does exactness matter? ``python -m benchmarks.exactness --teacher runs/fashion-mnist/teacher``.

On Fashion-MNIST with few labels, by the recipe ``fashion-mnist``:

1. In float64, fastjac and the double backward from one seed: the relative difference of their losses
   over 100 steps, and of the weights then. Noise of half a grey level is on the images: without it their
   flat backgrounds give max-pools windows of equal values, where the derivative is not unique and
   rounding chooses.
2. In float32, the accuracy of both over the seeds.
3. The same with the three mistakes of public re-implementations: ``detached`` Jacobians, which have no
   gradient; the ``mean`` over the input's dimensions in the place of the sum; and one ``mixed`` index,
   ``logits[:, y]``, which gives each sample the sum of all labels' gradients. As public code has it,
   they differentiate the batch's statistics, too.

Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from fastjac.train.commands import prepare
from fastjac.train.loop import Training
from fastjac.train.objective import Step
from fastjac.train.options import StudentOptions
from fastjac.train.parse import parse

Loss = Callable[[Tensor, Tensor], Tensor]


def label_sum(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).sum()


def mixed_sum(logits: Tensor, y: Tensor) -> Tensor:
    return logits[:, y].sum()


def squared_distance(js: Tensor, jt: Tensor) -> Tensor:
    return (js - jt).square().flatten(1).sum(1).mean()


# What is differentiated, the distance, and whether the student's Jacobian keeps its graph.
MISTAKES: dict[str, tuple[Loss, Loss, bool]] = {
    "detached": (label_sum, squared_distance, False),
    "mean": (label_sum, nn.functional.mse_loss, True),
    "mixed": (mixed_sum, squared_distance, True),
}


def mistaken(training: Training, weight: float, mistake: str, x: Tensor, y: Tensor) -> Step:
    """A step with a public mistake, by plain autograd."""
    scalar, distance, keep = MISTAKES[mistake]
    teacher = training.objective.teacher
    leaf = x.clone().requires_grad_()
    logits = training.model(leaf)
    (js,) = torch.autograd.grad(scalar(logits, y), leaf, create_graph=True)
    (jt,) = torch.autograd.grad(scalar(teacher(leaf), y), leaf)
    term = distance(js if keep else js.detach(), jt.detach())
    loss = cross_entropy(logits, y)
    return Step(loss + weight * term, logits, {"ce": loss, "jacobians": term})


def float64_curves(options: StudentOptions, steps: int) -> dict[str, float]:
    """The relative difference between both strategies, of the losses and of the final weights."""
    losses, weights = [], []
    for strategy in ("auto", "autograd"):
        training = prepare(replace(options, strategy=strategy, teacher_cache="off"))
        training.model.double().train()
        training.objective.double()
        order = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(training.model.parameters(), 0.05, momentum=0.9)
        images = training.batches.images
        curve = []
        for _ in range(steps):
            index = torch.randint(len(images), (options.batch_size,), generator=order).tolist()
            x, y = default_collate([images[i] for i in index])
            x = x + torch.rand(x.shape, generator=order) / 510
            step = training.objective(x.double(), y)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            curve.append(step.loss.detach())
        losses.append(torch.stack(curve))
        weights.append(torch.cat([p.detach().flatten() for p in training.model.parameters()]))
    apart = [(a - b).norm() / b.norm() for a, b in (losses, weights)]
    return {"loss": apart[0].item(), "weights": apart[1].item()}


def accuracy(options: StudentOptions, contender: str) -> float:
    """Of a student trained as ``contender`` says."""
    strategy = "autograd" if contender == "double backward" else "auto"
    jacobians = 0.0 if contender == "no Jacobians" else options.jacobians
    with TemporaryDirectory() as folder:
        options = replace(options, strategy=strategy, jacobians=jacobians, output=folder)
        training = prepare(options)
        if contender in MISTAKES:
            training.step.objective = partial(mistaken, training, jacobians, contender)
        return training.run(bar=False)["test_accuracy"]


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--samples", type=int, default=10, help="images per class")
    parser.add_argument("--steps", type=int, default=100, help="of the float64 curves")
    chosen = parser.parse_args()
    words = ["--config", "fashion-mnist", "--teacher", str(chosen.teacher), "--activations", "0"]
    words += ["--samples-per-class", str(chosen.samples)]
    options = parse("student", StudentOptions, words)
    print(json.dumps({"float64": float64_curves(options, chosen.steps)}), flush=True)
    for seed in chosen.seeds:
        for contender in ("no Jacobians", "fastjac", "double backward", *MISTAKES):
            found = accuracy(replace(options, seed=seed), contender)
            line = {"contender": contender, "seed": seed, "accuracy": round(100 * found, 2)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
