"""The loss of a step: the sum of the weighted terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    activation_match_loss,
    attention_match_loss,
)
from fastjac.data import ImageData
from fastjac.features import find_layer, forward_with_features
from fastjac.models import ModelSpec, check_image_size, create_model, load_weights, read_weights
from fastjac.models.levels import level_layer
from fastjac.train.build import load_trained
from fastjac.train.options import StudentOptions
from fastjac.train.sources import is_library_name


@dataclass(frozen=True)
class Step:
    """What a step computed: the loss to go down from, the logits ``[B, classes]``, each term."""

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


Objective = Callable[[Tensor, Tensor], Step]


def classification(model: nn.Module) -> Objective:
    """Cross-entropy with the labels."""

    def step(x: Tensor, y: Tensor) -> Step:
        logits = model(x)
        loss = cross_entropy(logits, y)
        return Step(loss, logits, {"ce": loss})

    return step


class Distillation(nn.Module):
    """Cross-entropy and what is taken from a teacher, as the options weigh them.

    One forward of each network serves all terms. Holds the teacher, in eval mode and without
    gradients; the student is trained through it.
    """

    def __init__(self, options: StudentOptions, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.weights = {
            term: getattr(options, term)
            for term in ("ce", "activations", "attention", "jacobians")
            if getattr(options, term)
        }
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.layers: tuple[str | None, str | None] = (None, None)
        window = options.target == "attention-window"
        if "attention" in self.weights or ("jacobians" in self.weights and window):
            self.layers = (
                options.layer or level_layer(student, options.level),
                options.teacher_layer or level_layer(teacher, options.level),
            )
            find_layer(student, self.layers[0], "the student")
            find_layer(teacher, self.layers[1], "the teacher")
        self.matching = None
        if "jacobians" in self.weights:
            if "attention" in self.weights and not window:
                raise FastjacError(
                    "--attention with --jacobians needs --target attention-window: both terms are "
                    "taken at one layer"
                )
            target = LabelLogit()
            if window:
                target = AttentionWindow(
                    self.layers[0],
                    options.window,
                    options.power,
                    options.anchor,
                    teacher_layer=self.layers[1],
                )
            self.matching = JacobianMatching(
                student, teacher, target, options.normalize, options.batch_stats, options.strategy
            )

    def forward(self, x: Tensor, y: Tensor) -> Step:
        terms = {}
        if self.matching is not None:
            out = self.matching(x, y)
            logits, features = out.student_logits, out.student_features
            logits_t, features_t = out.teacher_logits, out.teacher_features
            terms["jacobians"] = out.jacobian_loss
        else:
            logits, features = forward_with_features(self.student, x, self.layers[0])
            with torch.no_grad():
                logits_t, features_t = forward_with_features(self.teacher, x, self.layers[1])
        if "ce" in self.weights:
            terms["ce"] = cross_entropy(logits, y)
        if "activations" in self.weights:
            terms["activations"] = activation_match_loss(logits, logits_t)
        if "attention" in self.weights:
            terms["attention"] = attention_match_loss(features, features_t)
        loss = sum(self.weights[term] * value for term, value in terms.items())
        return Step(loss, logits, terms)


def distillation(options: StudentOptions, student: nn.Module, data: ImageData) -> Objective:
    """The objective of a student; cross-entropy alone needs no teacher."""
    taught = [t for t in ("activations", "attention", "jacobians") if getattr(options, t)]
    if not taught:
        if not options.ce:
            raise FastjacError("every weight is 0: --ce, --activations, --attention, --jacobians")
        return classification(student)
    if options.teacher is None:
        raise FastjacError(f"--teacher is missing; --{taught[0]} needs one")
    teacher, classes = _teacher(options, data)
    by_class = "activations" in taught or (
        "jacobians" in taught and options.target == "label-logit"
    )
    if by_class and len(classes) != len(data.classes):
        raise FastjacError(
            f"the teacher {options.teacher} has {len(classes)} classes, {data.name} has "
            f"{len(data.classes)}"
        )
    return Distillation(options, student, teacher)


def _teacher(options: StudentOptions, data: ImageData) -> tuple[nn.Module, list[str]]:
    source = str(options.teacher)
    if is_library_name(source):
        spec = ModelSpec(source, in_channels=data.channels)
        if (path := options.teacher_weights) is None:
            teacher = create_model(spec, pretrained=True)
        else:
            weights = read_weights(path)
            teacher = create_model(spec)
            try:
                load_weights(teacher, weights, path, ignore_head=False)
            except FastjacError:  # not the library's classes: then it must be those of the data
                teacher = create_model(replace(spec, num_classes=len(data.classes)))
                load_weights(teacher, weights, path, ignore_head=False)
        check_image_size(teacher, data.channels, data.size)
        with torch.no_grad():
            blank = torch.zeros(1, data.channels, data.size, data.size)
            classes = teacher.eval()(blank).shape[1]
        return teacher, [str(k) for k in range(classes)]
    if options.teacher_weights is not None:
        raise FastjacError("--teacher-weights goes with a teacher by name: torchvision/ or timm/")
    trained = load_trained(source)
    check_image_size(trained.model, data.channels, data.size)
    return trained.model, trained.classes
