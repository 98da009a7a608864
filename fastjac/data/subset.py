"""Few images per class."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastjac.errors import FastjacError


def class_balanced(
    labels: Sequence[int], per_class: int, seed: int, classes: Sequence[str]
) -> list[int]:
    """Sorted indices of ``per_class`` images of every class, drawn by ``seed``.

    Nested: with the same seed, a smaller subset is part of every larger one. Raises if a class has
    fewer images than that.
    """
    if per_class < 1:
        raise FastjacError(f"samples per class: expected at least 1, got {per_class}")
    generator = torch.Generator().manual_seed(seed)
    of_class = torch.as_tensor(labels)
    chosen = []
    for k, name in enumerate(classes):
        members = (of_class == k).nonzero().flatten()
        if per_class > len(members):
            raise FastjacError(
                f"samples per class: asked for {per_class}, class {name!r} has {len(members)} "
                "training images"
            )
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[:per_class]])
    return sorted(torch.cat(chosen).tolist())
