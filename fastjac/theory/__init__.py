"""Propositions 1 to 3 of Srinivas & Fleuret, "Knowledge Transfer with Jacobian Matching" (ICML 2018).

Each as a function that computes both sides, so that it can be checked on networks and data of one's
own. ``docs/theory.md`` has the statements, the derivations and what each function shows. PyTorch alone
is needed; everything runs on the device of the tensors.
"""

from fastjac.theory.covering import (
    METRICS,
    FarthestFirst,
    Hausdorff,
    TransferBound,
    farthest_first,
    hausdorff,
    lipschitz_estimate,
    nearest_distances,
    transfer_bound,
)
from fastjac.theory.noise import (
    NoiseExpansion,
    NormalizedNoise,
    noise_expansion,
    normalized_noise_expansion,
)

__all__ = [
    "METRICS",
    "FarthestFirst",
    "Hausdorff",
    "NoiseExpansion",
    "NormalizedNoise",
    "TransferBound",
    "farthest_first",
    "hausdorff",
    "lipschitz_estimate",
    "nearest_distances",
    "noise_expansion",
    "normalized_noise_expansion",
    "transfer_bound",
]
