"""Which images make up which batch: a function of the seed and the epoch alone."""

from __future__ import annotations

import torch
from torch import Tensor


def epoch_batches(
    images: int, batch_size: int, steps: int | None, generator: torch.Generator
) -> list[list[int]]:
    """The batches of one epoch, as indices into ``images`` images.

    Shuffled passes over the data follow one another until there are ``steps`` batches;
    ``steps=None`` is one pass. A pass leaves out its last batch if that is incomplete, unless it is
    the only one, so that no BatchNorm sees a stray image or two; the next pass is shuffled anew.
    """
    per_pass = max(1, images // batch_size)
    steps = per_pass if steps is None else steps
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(images, generator=generator)
        batches += order.split(batch_size)[:per_pass]
    return [batch.tolist() for batch in batches[:steps]]
