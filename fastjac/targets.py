"""Which scalar of a network is differentiated: one phi per sample.

Matching compares J = d phi / d x of two networks (Srinivas & Fleuret, ICML 2018). A target says what
phi is, and nothing about how J is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops.attention_window import attention_window


@dataclass(frozen=True)
class LabelLogit:
    """phi_i = logits[i, y_i]: the pre-softmax output of the correct class (distillation)."""

    normalize: ClassVar[bool] = False
    layer: ClassVar[None] = None

    def for_teacher(self) -> LabelLogit:
        """The same target."""
        return self

    def scalar(self, logits: Tensor, y: Tensor) -> Tensor:
        """phi, ``[B]``, from logits ``[B, classes]`` and labels ``[B]`` (int64)."""
        self.check(logits, y)
        return logits.gather(1, y[:, None])[:, 0]

    def check(self, logits: Tensor, y: Tensor | None) -> None:
        """Raise unless ``y`` labels every row of ``logits``.

        The range of the labels is checked on the CPU alone: on a GPU it would make the host wait, and
        there the gather itself fails.
        """
        if y is None:
            raise FastjacError("LabelLogit needs the labels y; got None")
        if logits.dim() != 2:
            raise FastjacError(
                f"LabelLogit needs logits [B, classes]; the model gave {list(logits.shape)}"
            )
        if y.dtype != torch.int64 or y.shape != logits.shape[:1]:
            raise FastjacError(
                f"labels y: expected int64 [{logits.shape[0]}], got "
                f"{str(y.dtype).removeprefix('torch.')} {list(y.shape)}"
            )
        if y.device != logits.device:
            raise FastjacError(
                f"labels y are on {y.device}; the model's logits are on {logits.device}"
            )
        if (
            y.device.type == "cpu"
            and len(y)
            and not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]
        ):
            raise FastjacError(
                f"labels y: expected 0 to {logits.shape[1] - 1}, "
                f"got {int(y.min())} to {int(y.max())}"
            )


@dataclass(frozen=True)
class AttentionWindow:
    """The brightest window of an attention map (transfer).

    With Z = features at ``layer``, ``[B, C, h, w]``: A = mean over channels of ``|Z|^power``; P =
    A averaged over k x k windows, stride 1, no padding, k = max(1, floor(h * window)); phi = P at one
    position per sample, P's argmax. ``anchor="teacher"``: the teacher's argmax, for both networks
    (mapped by relative coordinates if the maps differ in size); ``"own"``: each network's own.

    ``layer`` and ``teacher_layer`` (default: the same) are named as ``named_modules()`` names them.
    ``power`` is 1, or at least 2 (between them phi has no second derivative where a feature is 0).
    """

    layer: str
    window: float = 1 / 5
    power: float = 2
    anchor: Literal["teacher", "own"] = "teacher"
    teacher_layer: str | None = None

    normalize: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.window <= 1:
            raise FastjacError(
                f"AttentionWindow: window is a share of the map's height, in (0, 1]; got {self.window}"
            )
        if self.power != 1 and self.power < 2:
            raise FastjacError(f"AttentionWindow: power must be 1 or at least 2; got {self.power}")
        if self.anchor not in ("teacher", "own"):
            raise FastjacError(
                f"AttentionWindow: anchor is 'teacher' or 'own'; got {self.anchor!r}"
            )

    def for_teacher(self) -> AttentionWindow:
        """The same target on the teacher's layer."""
        return AttentionWindow(self.teacher_layer or self.layer, self.window, self.power)

    def side(self, features: Tensor) -> int:
        """k, the window's height and width in the map's pixels."""
        if features.dim() != 4:
            raise FastjacError(
                f"layer {self.layer!r} is not a feature map: expected [B, C, h, w], "
                f"got {list(features.shape)}"
            )
        h, w = features.shape[2:]
        k = max(1, math.floor(h * self.window + 1e-9))
        if k > w:
            raise FastjacError(
                f"layer {self.layer!r}: a {k}x{k} window ({self.window:.3g} of the height) "
                f"is larger than the {h}x{w} map"
            )
        return k

    def pooled(self, features: Tensor) -> Tensor:
        """P, ``[B, h - k + 1, w - k + 1]``."""
        k = self.side(features)
        return torch.nn.functional.avg_pool2d(self.magnitude(features).mean(1, True), k, 1)[:, 0]

    def position(self, features: Tensor) -> Tensor:
        """P's argmax, ``[B, 2]`` int64: the first row and column of the window.

        P is summed in float32 or wider here, also for features of less.
        """
        return attention_window(features.detach(), self.side(features), self.power)[0]

    def scalar(self, features: Tensor, position: Tensor) -> Tensor:
        """phi, ``[B]``, from the features and a position ``[B, 2]``."""
        pooled = self.pooled(features)
        return pooled.flatten(1).gather(1, (position[:, :1] * pooled.shape[2] + position[:, 1:]))[
            :, 0
        ]

    def transfer(self, position: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        """``position`` on the map ``source``, as a position on the map ``destination``.

        The centre of the window keeps its relative coordinates; the window stays inside the map.
        """
        if source.shape[2:] == destination.shape[2:]:
            return position
        k_from, k_to = self.side(source), self.side(destination)
        axes = []
        for axis, (n_from, n_to) in enumerate(
            zip(source.shape[2:], destination.shape[2:], strict=True)
        ):
            twice_centre = (2 * position[:, axis] + k_from) * n_to  # in units of 1 / n_from
            start = (twice_centre - k_to * n_from).div(2 * n_from, rounding_mode="floor")
            axes.append(start.clamp(0, n_to - k_to))
        return torch.stack(axes, 1)

    def magnitude(self, z: Tensor) -> Tensor:
        """``|z|^power``."""
        if self.power == 1:
            return z.abs()
        return z.pow(self.power) if self.power % 2 == 0 else z.abs().pow(self.power)


Target = LabelLogit | AttentionWindow
