"""The metrics of an epoch of training, as running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac.train import ranks
from fastjac.train.step import Piece


class Tally:
    """Means of the loss and its terms over all images, and the accuracy over those with a label.

    The sums stay on the device until they are read. Of labels as probabilities, the largest counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.images = device, 0
        self.sums: dict[str, Tensor] = {}
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.labelled = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, piece: Piece) -> None:
        """Count what a step computed."""
        y = piece.y.argmax(1) if piece.y.is_floating_point() else piece.y
        self.images += len(y)
        self.correct += (piece.logits.argmax(1) == y).sum()
        self.labelled += (y >= 0).sum()
        for name, value in piece.terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.float() * len(y)

    def joint(self) -> Tally:
        """The tally of all processes together."""
        if ranks.count() == 1:
            return self
        counts = [self.correct.new_tensor(self.images), self.correct, self.labelled]
        total = torch.stack([v.double() for v in [*counts, *self.sums.values()]])
        images, correct, labelled, *sums = ranks.add_up(total)
        joint = Tally(self.device)
        joint.images = int(images.item())
        joint.correct, joint.labelled = correct.long(), labelled.long()
        joint.sums = dict(zip(self.sums, (value.float() for value in sums), strict=True))
        return joint

    def loss(self) -> float:
        """The mean loss so far."""
        return (self.sums["loss"] / self.images).item()

    def accuracy(self) -> float:
        """The share of right predictions so far, in train mode."""
        return self.correct.item() / max(1, self.labelled.item())

    def row(self) -> dict[str, float]:
        """The metrics, by the names in ``metrics.jsonl``."""
        means = {f"train_{name}": value.item() / self.images for name, value in self.sums.items()}
        return means | {"train_accuracy": self.accuracy()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "sums": dict(self.sums),
            "correct": self.correct,
            "labelled": self.labelled,
        }

    def load_names(self, state: dict[str, Any]) -> None:
        """Start from nothing, with the terms of ``state``, of which another process has the sums."""
        self.sums = {name: torch.zeros((), device=self.device) for name in state["sums"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        values = [*state["sums"].values(), state["correct"], state["labelled"]]
        if any(value.shape != () for value in values):
            raise ValueError("a sum of the epoch's metrics is no single number")
        self.images = state["images"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.correct = state["correct"].to(self.device)
        self.labelled = state["labelled"].to(self.device)
