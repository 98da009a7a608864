"""What a linear classifier makes of a teacher's outputs: about as much as there is to transfer.

    python -m benchmarks.linear_probe --img-size 64 --teacher timm/tf_efficientnet_lite0 \\
        --teacher-weights efficientnet-lite0-57934424.pth

Logistic regression (scikit-learn's, on standardised inputs) of a frozen network's logits, and of the
input of its last layer, from a few images per class: those that the trainer draws with that seed.
One line of JSON per number of images, with accuracies in percent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from fastjac.data import class_balanced
from fastjac.models.create import find_head
from fastjac.train.build import build_data
from fastjac.train.objective import find_teacher
from fastjac.train.options import StudentOptions


def outputs(teacher: nn.Module, images: Dataset) -> dict[str, np.ndarray]:
    """``features``, ``logits`` and ``labels`` of each image."""
    found: dict[str, list[torch.Tensor]] = {"features": [], "logits": [], "labels": []}
    _, head = find_head(teacher)
    handle = head.register_forward_pre_hook(
        lambda _, args: found["features"].append(args[0].flatten(1))
    )
    with torch.no_grad():
        for x, y in DataLoader(images, 100):
            found["logits"].append(teacher(x))
            found["labels"].append(y)
    handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def accuracy(train: Sequence[np.ndarray], test: Sequence[np.ndarray], strength: float) -> float:
    """Percent of ``test`` that a classifier of ``train`` gets right; each is inputs and labels."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=strength))
    return 100 * classifier.fit(*train).score(*test)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear_probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", default="fashion-mnist", help="as the trainer's")
    parser.add_argument("--data-dir")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-weights")
    parser.add_argument("--samples", type=int, nargs="+", default=[5, 10, 25, 50])
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    parser.add_argument("--test", type=int, default=3000, help="the first test images")
    parser.add_argument("--strength", type=float, default=0.05, help="inverse of the regulariser's")
    args = parser.parse_args()
    chosen = ("dataset", "data_dir", "img_size", "channels", "teacher", "teacher_weights")
    options = StudentOptions(**{name: getattr(args, name) for name in chosen})
    data = build_data(options, None)
    teacher, _ = find_teacher(options, data)
    test = outputs(teacher.eval(), Subset(data.test, range(min(args.test, len(data.test)))))
    for count in args.samples:
        indices = class_balanced(data.labels, count, args.seed, data.classes)
        train = outputs(teacher, Subset(data.train, indices))
        row = {
            name: accuracy(
                (train[name], train["labels"]), (test[name], test["labels"]), args.strength
            )
            for name in ("features", "logits")
        }
        print(json.dumps({"samples_per_class": count, **row}), flush=True)


if __name__ == "__main__":
    main()
