"""Ways of taking one training step of distillation, with and without Jacobian matching.

Each is a :class:`Contender` on its own copies of the same networks and images; :func:`contender` makes
one by name. Those that use fastjac are here; those that take Jacobians without it are in
:mod:`benchmarks.rivals`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac
import fastjac.models.vgg as vgg
from benchmarks import measuring
from fastjac.features import find_layer


@dataclass(frozen=True)
class Configuration:
    """Networks, image size and target of a step.

    ``target`` is one of :data:`TARGETS`, where there is no ``layer``; with one, it is its window, and
    the windows of ``"layer1+layer2"`` are matched from one forward.
    ``before`` and ``after`` are how far the input that the window's features depend on reaches, in
    pixels before the window's first cell and behind its last, in multiples of ``stride``, a cell's size.
    """

    student: str
    teacher: str
    size: int
    batch: int
    layer: str = ""
    target: str = "label"
    window: float = 1 / 5
    batch_stats: str = "frozen"
    classes: int = 100
    width: float = 1.0  # of a VGG
    stride: int = 1
    before: int = 0
    after: int = 0


TARGETS: dict[str, fastjac.Target] = {
    "label": fastjac.LabelLogit(),
    "cross-entropy": fastjac.Scalar(lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "projection": fastjac.Projection(1),
    "three-logits": fastjac.Logits([0, 1, 2]),
    "logits": fastjac.Logits(),
}

_POOL2 = {"layer": "pool2", "stride": 4, "before": 4, "after": 4}
_LAYER1 = {"layer": "layer1", "stride": 4, "before": 32, "after": 28}

CONFIGURATIONS = {
    "vgg9-224": Configuration("vgg9", "vgg9", 224, 8, **_POOL2),
    "vgg9-448": Configuration("vgg9", "vgg9", 448, 8, window=1 / 10, **_POOL2),
    "vgg9-224-batch": Configuration("vgg9", "vgg9", 224, 8, batch_stats="batch", **_POOL2),
    "vgg9-224-logits": Configuration("vgg9", "vgg9", 224, 8),
    "resnet18-224": Configuration("resnet18", "resnet34", 224, 8, **_LAYER1),
    "vgg4-32": Configuration("vgg4", "vgg9", 32, 128, batch_stats="batch"),
}


def network(name: str, config: Configuration) -> nn.Module:
    """A VGG of fastjac's, or a network of torchvision's."""
    import torchvision

    if hasattr(vgg, name):
        return getattr(vgg, name)(config.classes, width=config.width)
    return torchvision.models.get_model(name, num_classes=config.classes)


class WithFeatures(nn.Module):
    """A network that returns its logits and what ``layer`` returned, or None; it may be compiled."""

    def __init__(self, net: nn.Module, layer: str) -> None:
        super().__init__()
        self.net, self.layer = net, layer.partition("+")[0]
        self.caught: list[Tensor] = []
        if self.layer:
            find_layer(net, self.layer).register_forward_hook(
                lambda *call: self.caught.append(call[2])
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self.net(x)
        return logits, self.caught.pop() if self.layer else None


class Contender:
    """One way of taking the step. This one is plain distillation, without a Jacobian term.

    Attributes:
        student, teacher: the networks, the student in train mode.
        x, y: the images and labels.
        jacobians: whether the loss has the Jacobian term.
        batch_stats: how BatchNorm counts in its Jacobian.
        layouts: the memory layouts that it is worth measuring in.
    """

    jacobians = False
    batch_stats = "batch"
    layouts = measuring.LAYOUTS

    def __init__(
        self, config: Configuration, layout: str, device: str, amp: bool, double: bool = False
    ) -> None:
        torch.manual_seed(0)
        nets = [network(name, config) for name in (config.student, config.teacher)]
        form = measuring.memory_format(layout)
        dtype = torch.float64 if double else torch.float32
        student, teacher = (net.to(device, dtype, memory_format=form) for net in nets)
        torch.manual_seed(1)
        x = torch.rand(config.batch, 3, config.size, config.size)
        self.x = x.to(device, dtype, memory_format=form)
        self.y = torch.randint(config.classes, (config.batch,)).to(device)
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(False)
        self.config, self.device, self.amp = config, device, amp
        self.prepare()
        self.taken: Callable[[Tensor, Tensor], Tensor] = self.take

    def prepare(self) -> None:
        """What is done once, before the first step."""
        self.networks = [
            WithFeatures(net, self.config.layer) for net in (self.student, self.teacher)
        ]
        self.loss: Callable[[Tensor, Tensor], Tensor] = self.compute

    def step(self) -> float:
        """Take the step; the loss."""
        return float(self.taken(self.x, self.y))  # waits for the device

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        """The step on a batch; the loss, for which nothing waits."""
        self.student.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = self.loss(x, y)
        loss.backward()
        return loss.detach()

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch."""
        student, teacher = self.networks
        with torch.no_grad():
            logits_t, features_t = teacher(x)
        logits, features = student(x)
        return distillation_loss(logits, logits_t, features, features_t, y)


def distillation_loss(
    logits: Tensor, logits_t: Tensor, features: Tensor | None, features_t: Tensor | None, y: Tensor
) -> Tensor:
    """Cross-entropy, the logits' squared error and, where there are features, attention matching."""
    loss = F.cross_entropy(logits, y) + fastjac.activation_match_loss(logits, logits_t)
    if features is None or features_t is None:
        return loss
    return loss + fastjac.attention_match_loss(features, features_t)


class PlainCompiled(Contender):
    """Networks and loss of plain distillation as one graph of ``torch.compile``."""

    layouts = ("channels_last",)

    def prepare(self) -> None:
        super().prepare()
        self.loss = torch.compile(self.compute, fullgraph=True, dynamic=False)


class Fused(Contender):
    """Plain distillation on networks that ``fastjac.fuse`` has rewritten."""

    def prepare(self) -> None:
        self.student, self.teacher = fastjac.fuse(self.student), fastjac.fuse(self.teacher)
        super().prepare()


class Matching(Contender):
    """``fastjac.JacobianMatching`` beside the losses of plain distillation."""

    jacobians = True
    strategy = "auto"

    def prepare(self) -> None:
        config = self.config
        self.batch_stats = config.batch_stats
        targets: tuple[fastjac.Target, ...] = (TARGETS[config.target],)
        if config.layer:
            layers = config.layer.split("+")
            targets = tuple(fastjac.AttentionWindow(each, config.window) for each in layers)
        options = {"batch_stats": self.batch_stats, "strategy": self.strategy}
        self.matcher = fastjac.JacobianMatching(self.student, self.teacher, targets, **options)
        self.loss = self.compute

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.matcher(x, y)
        features = (out.student_features[0], out.teacher_features[0])
        plain = distillation_loss(out.student_logits, out.teacher_logits, *features, y)
        return plain + out.jacobian_loss


class MatchingCompiledBehind(Matching):
    """As :class:`Matching`, the layers behind the target's compiled; in a ResNet alone."""

    layouts = ("channels_last",)

    def prepare(self) -> None:
        super().prepare()
        for net in (self.student, self.teacher):
            for name in ("layer2", "layer3", "layer4"):
                find_layer(net, name).compile(fullgraph=True, dynamic=False)


class Without(Matching):
    """:class:`Matching` without one of the things that make it fast, by ``replaced``.

    ``replaced`` has the names of functions and properties, and what stands in their place.
    """

    replaced: dict[str, Any]

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        with ExitStack() as stack:
            for name, value in self.replaced.items():
                stack.enter_context(mock.patch(name, value))
            return super().take(x, y)


def _no_pool(chosen: str) -> Any:
    from fastjac.fusion.chains import pool_of

    def found(*args: Any, **kwargs: Any) -> str | None:
        pool = pool_of(*args, **kwargs)
        return None if pool is not None and pool.startswith(chosen) else pool

    return found


_NO = lambda *_: False  # noqa: E731


def without(what: str) -> type[Without]:
    """The contender without ``what``, of :data:`PARTS`."""
    return type("Without", (Without,), {"replaced": PARTS[what]})


PARTS: dict[str, dict[str, Any]] = {
    "winograd": {
        "fastjac.ops.winograd.winograd_is_faster": _NO,
        "fastjac.fusion.mode.winograd_is_faster": _NO,
    },
    "pool-2x2": {"fastjac.fusion.mode.pool_of": _no_pool("2x2")},
    "pool-3x3": {"fastjac.fusion.mode.pool_of": _no_pool("3x3")},
    "recomputed-convolution": {"fastjac.fusion.recompute._GROWTH": float("inf")},
    "recomputed-chain": {"fastjac.fusion.chains.Chain.recomputable": False},
    "fusion": {"fastjac.fusion.mode.native": _NO},
}


class Reference(Matching):
    """What the others are compared with: ``JacobianMatching`` by its own double backward."""

    strategy = "autograd"
