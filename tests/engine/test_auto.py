"""``strategy="auto"``: on crops where they are allowed and pay, on whole maps else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastjac import AttentionWindow, LabelLogit, with_jacobian


class SweptMaps(TorchDispatchMode):
    """Notes the map sizes of the cotangents that convolutions take in the reverse sweep."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            self.sizes.append(tuple(args[0].shape[2:]))
        return func(*args, **kwargs or {})


def swept(
    target, strategy: str, batch_stats: str = "frozen", size: tuple[int, int] = (20, 20)
) -> list[tuple[int, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )
    x, y = torch.rand(2, 3, *size), torch.tensor([0, 1])
    with SweptMaps() as maps:
        with_jacobian(model, x, target, y, strategy=strategy, batch_stats=batch_stats)
    assert len(maps.sizes) == 2
    return maps.sizes


# Of 20 rows and columns a window sees its own and 4 more.
@pytest.mark.parametrize(("window", "side"), [(0.2, 4), (0.5, 10)])
def test_a_window_that_sees_less_than_half_is_swept_on_crops(window, side):
    target = AttentionWindow("4", window=window)
    assert (side + 4) ** 2 < 20**2 / 2
    assert swept(target, "auto") == swept(target, "local") == [(side, side), (side + 2, side + 2)]


@pytest.mark.parametrize(
    ("target", "batch_stats"),
    [
        (AttentionWindow("4", window=0.6), "frozen"),  # sees 16 x 16, more than half
        (AttentionWindow("4", window=0.2), "batch"),
        (LabelLogit(), "frozen"),
    ],
    ids=["more than half", "batch statistics", "no window"],
)
def test_all_else_is_swept_on_whole_maps(target, batch_stats):
    assert swept(target, "auto", batch_stats) == [(20, 20), (20, 20)]
    if target.features_alone and batch_stats == "frozen":
        assert swept(target, "local") != [(20, 20), (20, 20)]


def test_a_window_that_sees_one_half_is_swept_on_whole_maps():
    target = AttentionWindow("4", window=0.8)  # 16 x 16, which sees 20 x 20
    assert swept(target, "auto", size=(20, 40)) == [(20, 40), (20, 40)]
    assert swept(target, "auto", size=(20, 41)) == [(16, 16), (18, 18)]
