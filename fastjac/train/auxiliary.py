"""Auxiliary heads of a network: classifiers at inner layers, for the training alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.models.create import auxiliary_heads
from fastjac.train.objective import Objective, Step
from fastjac.train.terms import label_cross_entropy


class AuxiliaryHeads(Objective):
    """An objective, and ``weight`` times the cross-entropies of the heads of ``model``.

    Their sum is the term ``auxiliary``. In eval mode no head runs, and the objective is what it was.
    Unlabelled images (-1) add nothing.
    """

    def __init__(self, objective: Objective, model: nn.Module, weight: float) -> None:
        names = auxiliary_heads(model)
        super().__init__(
            *(
                replace(network, read=[*network.read, *names])
                if network.model is model
                else network
                for network in objective.networks
            )
        )
        self.objective, self.weight = objective, weight
        self.heads = objective.heads
        self.logits: dict[str, Tensor] = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, logits: Tensor) -> None:
            self.logits.setdefault(name, logits)  # of the first forward, if there are several

        return keep

    def forward(self, x: Tensor, y: Tensor) -> Step:
        self.logits.clear()
        step = self.objective(x, y)
        if not self.logits:
            return step
        losses = [label_cross_entropy(logits, y) for logits in self.logits.values()]
        auxiliary = torch.stack(losses).sum()
        self.logits.clear()
        loss = step.loss + self.weight * auxiliary
        return Step(loss, step.logits, {**step.terms, "auxiliary": auxiliary})
