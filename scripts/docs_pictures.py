"""The documentation's pictures, as SVG: each is drawn from what the code computes."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import nn

from fastjac import AttentionWindow, with_jacobian

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "fastjac", "svg.fonttype": "none", "font.size": 11}
FORWARD, REVERSE, TANGENT = "#4a6fa5", "#b5523b", "#3f8f5b"


def _svg(figure: plt.Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return text.getvalue()


def sweeps() -> str:
    """The passes of a training step over a network of three calls."""
    figure, axes = plt.subplots(figsize=(9, 4.2))
    places, values = [0, 2.4, 4.8, 7.2], ["x", "convolution", "ReLU", "φ"]
    rows = [
        ("1 forward", FORWARD, 1, ["x", "u", "z", "φ"]),
        ("2 reverse sweep", REVERSE, -1, ["J", "δ", "δ", "1"]),
        ("4 forward sweep", TANGENT, 1, ["v", "u̇", "ż", ""]),
        ("5 backward", REVERSE, -1, ["", "ū", "z̄", "∂L/∂z"]),
    ]
    for place, value in zip(places, values, strict=True):
        axes.text(place, 4.7, value, ha="center", weight="bold")
    for row, (name, color, direction, symbols) in enumerate(rows):
        y = 3.8 - row
        axes.text(-3.2, y, name, va="center", color=color)
        for place, symbol in zip(places, symbols, strict=True):
            axes.text(place, y, symbol, ha="center", va="center", color=color)
        for left, right, a, b in zip(places, places[1:], symbols, symbols[1:], strict=False):
            if a and b:
                start, end = (left, right) if direction > 0 else (right, left)
                gap = 0.35 if direction > 0 else -0.35
                arrow = {"arrowstyle": "->", "color": color}
                axes.annotate("", (end - gap, y), (start + gap, y), arrowprops=arrow)
    axes.text(-3.2, 2.3, "3 v = ∂L/∂J", va="center", color=FORWARD)
    axes.text(2.4, 1.35, "the weight's gradient, for (v, δ)", ha="center", size=9, color=TANGENT)
    axes.text(2.4, 0.35, "+ the weight's gradient, for (x, ū)", ha="center", size=9)
    axes.text(6, 0.35, "+ curvature, where not linear", ha="center", size=9)
    axes.set(xlim=(-3.3, 8.2), ylim=(0, 5))
    axes.axis("off")
    return _svg(figure)


def crop() -> str:
    """The support of a window's Jacobian, in the image and in the layer's map."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
    )
    grid = torch.linspace(-1, 1, 64)
    blob = torch.exp(-12 * ((grid[:, None] - 0.3) ** 2 + (grid[None] + 0.25) ** 2))
    x = (blob + 0.15 * torch.rand(64, 64))[None, None]
    target = AttentionWindow("7", window=1 / 5)
    out = with_jacobian(model, x, target, strategy="local")
    attention = out.features.square().mean(1)[0].detach()
    (row, column), side = target.position(out.features)[0].tolist(), target.side(out.features)
    magnitude = out.jacobian[0, 0].detach().abs()
    rows, columns = magnitude.nonzero().T
    figure, (image, features, jacobian) = plt.subplots(1, 3, figsize=(9, 3.2))
    for axes, picture, title in (
        (image, x[0, 0], "x, 64 × 64, and the crop"),
        (features, attention, f"attention map, and the {side} × {side} window"),
        (jacobian, magnitude, "|J|: zero outside of the crop"),
    ):
        axes.imshow(picture, cmap="Greys")
        axes.set_title(title, size=10)
        axes.axis("off")
    box = {"fill": False, "edgecolor": REVERSE, "linewidth": 2}
    features.add_patch(plt.Rectangle((column - 0.5, row - 0.5), side, side, **box))
    low = (columns.min() - 0.5, rows.min() - 0.5)
    size = (int(columns.max() - columns.min()) + 1, int(rows.max() - rows.min()) + 1)
    for axes in (image, jacobian):
        axes.add_patch(plt.Rectangle(low, *size, **box))
    return _svg(figure)


PICTURES: dict[str, Callable[[], str]] = {"sweeps": sweeps, "crop": crop}
