"""The loss of a step: the sum of the weighted terms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    Logits,
    Projection,
    Target,
    activation_match_loss,
    attention_match_loss,
    jacobian_norm_penalty,
    with_jacobian,
)
from fastjac.data import ImageData
from fastjac.errors import notice
from fastjac.features import capture, check_logits, find_layer
from fastjac.matching import TeacherResult
from fastjac.models import ModelSpec, check_image_size, create_model, load_weights, read_weights
from fastjac.models.create import find_head
from fastjac.models.levels import level_layer
from fastjac.train.build import load_trained
from fastjac.train.options import TAUGHT, TERMS, StudentOptions, flag
from fastjac.train.sources import is_library_name
from fastjac.train.teacher_cache import TeacherCache, teacher_key
from fastjac.train.terms import (
    Hint,
    decoupled_distillation_loss,
    knowledge_distillation_loss,
    label_cross_entropy,
    relational_distillation_loss,
)

_OF_LABELS = ("label-logit", "cross-entropy")  # targets that need a class of each image
_MEMORY = 1 << 30  # bytes of Jacobians that are kept in memory without being asked


@dataclass(frozen=True)
class Step:
    """What a step computed: the loss to go down from, the logits ``[B, classes]``, each term."""

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A network of a run, the layers of it that terms of the loss read, and those with a Jacobian."""

    role: str
    model: nn.Module
    read: Sequence[str] = ()
    differentiated: Sequence[str] = ()


class Objective(nn.Module):
    """What a step goes down from: called with images and labels, it gives a :class:`Step`.

    ``networks`` are those that it runs; ``heads`` are layers that are trained for its terms alone.
    """

    def __init__(self, *networks: Network) -> None:
        super().__init__()
        self.networks = list(networks)
        self.heads = nn.ModuleDict()


class Classification(Objective):
    """Cross-entropy with the labels ``[B]``, or with probabilities ``[B, classes]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(Network("network", model))
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Step:
        logits = self.model(x)
        loss = label_cross_entropy(logits, y)
        return Step(loss, logits, {"ce": loss})


@dataclass
class _Seen:
    """What the terms read of a network: its logits, and each level's features."""

    logits: Tensor
    features: Sequence[Tensor]


@dataclass(frozen=True)
class LabelCrossEntropy(LabelLogit):
    """phi_i = -log softmax(logits_i)[y_i], with labels as :class:`~fastjac.LabelLogit` takes them."""

    def scalar(self, output: Tensor, features: Tensor | None, y: Tensor) -> Tensor:
        self.check(output, y)
        return cross_entropy(output, y, reduction="none")

    def head(self, output: Tensor, features: Tensor | None, y: Tensor) -> None:
        return None


class Distillation(Objective):
    """Cross-entropy and what is taken from a teacher, as the options weigh them.

    Called with images ``x`` and labels ``y``: int64 ``[B]``, below 0 for an image without one (no
    cross-entropy; the Jacobian is that of the teacher's class), or probabilities ``[B, classes]`` (the
    Jacobian likewise; ``jacobian_norm``, which needs no teacher, is that of the largest one's class).
    One forward of each network serves all terms but ``noisy_activations``.

    Holds the teacher, in eval mode and without gradients; the student is trained through it. ``heads``
    are trained beside the student, for the terms alone: ``hint`` (a 1x1 convolution of the features) and
    ``logits`` (a second last layer, for a teacher of other classes than the data's).
    """

    def __init__(
        self,
        options: StudentOptions,
        student: nn.Module,
        teacher: nn.Module | None,
        data: ImageData,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.weights = {term: w for term in TERMS if (w := getattr(options, term))}
        self.student, self.teacher = student, teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.layers, self.teacher_layers = self._find_layers(student, teacher)
        if "activations" in self.weights and classes != len(data.classes):
            self.heads["logits"] = _second_head(student, data, int(classes or 0))
            notice(
                f"the teacher has {classes} classes, {data.name} has {len(data.classes)}: a second head "
                "of the student, which is not exported, matches its activations"
            )
        if "hints" in self.weights:
            self.heads["hint"] = self._hint(data)
        self.networks = self._networks()
        self.target: Target | tuple[Target, ...] | None = None
        self.matching = None
        if "jacobians" in self.weights:
            self.target = self._target()
            self.matching = JacobianMatching(
                *(student, teacher, self.target),
                options.normalize,
                options.batch_stats,
                options.strategy,
            )
        elif "jacobian_norm" in self.weights:
            self.target = self._target()
        self.cache = self._cache(data)

    def _find_layers(
        self, student: nn.Module, teacher: nn.Module | None
    ) -> tuple[list[str], list[str]]:
        options, window = self.options, self.options.target == "attention-window"
        of_features = {"attention", "hints"} & self.weights.keys()
        of_window = window and {"jacobians", "jacobian_norm"} & self.weights.keys()
        if not (of_features or of_window):
            return [], []
        levels = options.levels or [options.level]
        mine = [options.layer] if options.layer else [level_layer(student, n) for n in levels]
        for layer in mine:
            find_layer(student, layer, "the student")
        if teacher is None:
            return mine, []
        theirs = (
            [options.teacher_layer]
            if options.teacher_layer
            else [level_layer(teacher, n) for n in levels]
        )
        for layer in theirs:
            find_layer(teacher, layer, "the teacher")
        if len(mine) != len(theirs):
            raise FastjacError(
                f"{len(mine)} layers of the student and {len(theirs)} of the teacher; expected as "
                "many: --layer and --teacher-layer name one each, in place of --levels"
            )
        return mine, theirs

    def _target(self) -> Target | tuple[Target, ...]:
        options = self.options
        if options.target == "attention-window":
            teacher_layers = self.teacher_layers or self.layers
            return tuple(
                AttentionWindow(
                    *(layer, options.window, options.power, options.anchor), teacher_layer=theirs
                )
                for layer, theirs in zip(self.layers, teacher_layers, strict=True)
            )
        if options.target == "logits":
            return Logits()
        if options.target == "projection":
            return Projection(options.projections)
        of_label = LabelCrossEntropy if options.target == "cross-entropy" else LabelLogit
        return of_label(unlabelled="teacher" if self.teacher is not None else "error")

    def _hint(self, data: ImageData) -> Hint:
        blank = torch.zeros(2, data.channels, data.size, data.size)
        widths = []
        for net, layer in ((self.student, self.layers[0]), (self.teacher, self.teacher_layers[0])):
            mode = net.training
            with torch.no_grad(), capture(net.eval(), [layer]) as features:
                net(blank.to(next(net.parameters()).device))
            net.train(mode)
            if features[layer].dim() != 4:
                raise FastjacError(
                    f"--hints: layer {layer!r} gives {list(features[layer].shape)}; expected "
                    "[B, C, h, w]"
                )
            widths.append(features[layer].shape[1])
        return Hint(*widths)

    def _cache(self, data: ImageData) -> TeacherCache | None:
        """The cache of the teacher's results, where they depend on image and label alone."""
        options = self.options
        if self.teacher is None or options.teacher_cache == "off":
            return None
        if options.uncacheable():
            return None
        folder = None
        if options.teacher_cache != "auto":
            folder = Path(options.teacher_cache)
        elif not _comes_often(options, data):
            return None
        settings = (self.target if self.matching else None, self.teacher_layers, options.strategy)
        key = teacher_key(self.teacher, *settings, options.channels_last, data.channels, data.size)
        return TeacherCache(folder, key, self._facts)

    def forward(self, x: Tensor, y: Tensor) -> Step:
        options, weights = self.options, self.weights
        if options.input_noise and self.student.training:
            x = x + options.input_noise * torch.randn_like(x)
        hard = y if not y.is_floating_point() else y.new_full(y.shape[:1], -1, dtype=torch.int64)
        terms: dict[str, Tensor] = {}
        with self._embedding() as embedding:
            student, teacher = self._run(x, y, hard, terms)
        if "ce" in weights:
            terms["ce"] = label_cross_entropy(student.logits, y)
        if teacher is not None:
            terms |= self._taught_terms(student, teacher, hard, embedding)
        if "noisy_activations" in weights:
            noisy = x + options.noise * torch.randn_like(x)
            with torch.no_grad():
                logits_t = self.teacher(noisy)
            terms["noisy_activations"] = activation_match_loss(self.student(noisy), logits_t)
        loss = sum(weights[term] * value for term, value in terms.items())
        return Step(loss, student.logits, terms)

    def _networks(self) -> list[Network]:
        jacobians = {"jacobians", "jacobian_norm"} & self.weights.keys()
        head = [find_head(self.student)[0]] if "logits" in self.heads else []
        both = [("student", self.student, self.layers, head)]
        if self.teacher is not None:
            both.append(("teacher", self.teacher, self.teacher_layers, []))
        return [
            Network(role, model, [*layers, *more], layers if jacobians else ())
            for role, model, layers, more in both
        ]

    def _run(
        self, x: Tensor, y: Tensor, hard: Tensor, terms: dict[str, Tensor]
    ) -> tuple[_Seen, _Seen | None]:
        """Run student and teacher; with them the Jacobian's term, into ``terms``."""
        options, known = self.options, None
        if self.cache is not None:
            known = self._restored(x, self.cache(x, hard))
        if self.matching is not None:
            out = self.matching(x, hard, known)
            terms["jacobians"] = out.jacobian_loss
            window = isinstance(self.target, tuple)
            student = _Seen(out.student_logits, out.student_features if window else ())
            return student, _Seen(out.teacher_logits, out.teacher_features if window else ())
        taught = None
        if known is not None:
            taught = _Seen(known.logits, known.features)
        elif self.teacher is not None:
            taught = self._watch_teacher(x)
        if self.target is not None:
            out = with_jacobian(
                *(self.student, x, self.target, self._classes(y, taught)),
                batch_stats=options.batch_stats,
                strategy=options.strategy,
            )
            window = isinstance(self.target, tuple)
            jacobians = out.jacobian if window else (out.jacobian,)
            terms["jacobian_norm"] = sum(map(jacobian_norm_penalty, jacobians))
            student = _Seen(out.output, out.features if window else ())
        else:
            student = _seen(self.student, x, self.layers)
        return student, taught

    def _classes(self, y: Tensor, taught: _Seen | None) -> Tensor:
        """Whose logit's norm is penalised: the label's, without one the teacher's."""
        if y.is_floating_point():
            return y.argmax(1)
        return y if taught is None else torch.where(y < 0, taught.logits.argmax(1), y)

    def _watch_teacher(self, x: Tensor) -> _Seen:
        with torch.no_grad():
            return _seen(self.teacher, x, self.teacher_layers)

    def _taught_terms(
        self, student: _Seen, taught: _Seen, hard: Tensor, embedding: list[Tensor]
    ) -> dict[str, Tensor]:
        weights, temperature = self.weights, self.options.temperature
        terms: dict[str, Tensor] = {}
        pairs = list(zip(student.features, taught.features, strict=True))
        if "activations" in weights:
            logits = student.logits
            if "logits" in self.heads:
                logits = self.heads["logits"](embedding[0].flatten(1))
            terms["activations"] = activation_match_loss(logits, taught.logits)
        if "attention" in weights:
            terms["attention"] = sum(attention_match_loss(s, t) for s, t in pairs)
        if "kd" in weights:
            terms["kd"] = knowledge_distillation_loss(student.logits, taught.logits, temperature)
        if "dkd" in weights:
            labels = torch.where(hard < 0, taught.logits.argmax(1), hard)
            terms["dkd"] = decoupled_distillation_loss(
                student.logits, taught.logits, labels, temperature
            )
        if "rkd" in weights:
            terms["rkd"] = relational_distillation_loss(student.logits, taught.logits)
        if "hints" in weights:
            terms["hints"] = self.heads["hint"](*pairs[0])
        return terms

    @contextmanager
    def _embedding(self) -> Iterator[list[Tensor]]:
        """Collects the input of the student's last layer, if a second one reads it."""
        seen: list[Tensor] = []
        if "logits" not in self.heads:
            yield seen
            return
        _, head = find_head(self.student)
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            yield seen
        finally:
            handle.remove()

    def _facts(self, x: Tensor, hard: Tensor) -> list[Tensor]:
        """What the cache keeps of a teacher: logits, attention maps, and the matcher's part."""
        if self.matching is None:
            seen = self._watch_teacher(x)
            return [seen.logits, *map(_attention_map, seen.features)]
        result = self.matching.teacher_forward(x, hard)
        return result.facts(_attention_map)

    def _restored(self, x: Tensor, facts: list[Tensor]) -> TeacherResult | _Seen:
        if self.matching is None:
            return _Seen(facts[0], facts[1:])
        return self.matching.restore_teacher(x, facts)


def _comes_often(options: StudentOptions, data: ImageData) -> bool:
    """Whether an image is seen four times or more, and few enough of them for the memory."""
    few, images = options.samples_per_class, len(data.labels)
    if few is not None:
        images = few * len(data.classes) + sum(label < 0 for label in data.labels)
    images *= 1 + options.flip
    steps = options.epoch_steps or max(1, images // options.batch_size)
    often = options.epochs * steps * options.batch_size >= 4 * images
    return often and images * data.channels * data.size**2 * 4 <= _MEMORY


def _seen(model: nn.Module, x: Tensor, layers: Sequence[str]) -> _Seen:
    with capture(model, layers) as features:
        logits = check_logits(model(x), model)
    return _Seen(logits, [features[layer] for layer in layers])


def _attention_map(features: Tensor) -> Tensor:
    """Features of one channel with the attention map of ``features``."""
    return features.square().mean(1, keepdim=True).sqrt()


def _second_head(student: nn.Module, data: ImageData, classes: int) -> nn.Linear:
    """A last layer for the teacher's classes, on the input of the student's own."""
    _, head = find_head(student)
    width = getattr(head, "in_features", None)
    if width is None:
        raise FastjacError(
            f"--activations: the teacher has {classes} classes, {data.name} has {len(data.classes)}, "
            f"and a second head needs a student whose last layer is linear; it is {type(head).__name__}"
        )
    return nn.Linear(width, classes)


def distillation(options: StudentOptions, student: nn.Module, data: ImageData) -> Objective:
    """The objective of a student; cross-entropy alone needs no teacher."""
    taught = [term for term in TAUGHT if getattr(options, term)]
    if not any(getattr(options, term) for term in TERMS):
        raise FastjacError(f"every weight is 0: {', '.join(map(flag, TERMS))}")
    if not taught:
        if not options.jacobian_norm and not options.input_noise:
            return Classification(student)
        return Distillation(options, student, None, data)
    if options.teacher is None:
        raise FastjacError(f"--teacher is missing; {flag(taught[0])} needs one")
    teacher, classes = find_teacher(options, data)
    by_class = {"kd", "dkd", "noisy_activations"} & set(taught)
    if "jacobians" in taught and options.target != "attention-window":
        by_class.add("jacobians")
    if options.unlabelled and options.jacobian_norm and options.target in _OF_LABELS:
        by_class.add("jacobian_norm")
    if by_class and len(classes) != len(data.classes):
        raise FastjacError(
            f"the teacher {options.teacher} has {len(classes)} classes, {data.name} has "
            f"{len(data.classes)}, which {', '.join(map(flag, sorted(by_class)))} cannot do with; a "
            "teacher of other classes goes with --activations, --attention, --hints, and --jacobians of "
            "--target attention-window"
        )
    # Of a library's own classes, the numbers are known.
    known = not is_library_name(str(options.teacher)) or (
        options.teacher_weights is None and set(classes) == set(data.classes)
    )
    if by_class and known:
        _compare_names(options.teacher, classes, data)
    return Distillation(options, student, teacher, data, len(classes))


def _compare_names(teacher: str | None, classes: list[str], data: ImageData) -> None:
    """Raise for the same classes in another order; of other names, say so."""
    theirs, ours = list(map(str, classes)), list(map(str, data.classes))
    if theirs == ours:
        return
    a, b = next(pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1])
    said = f"of the teacher {teacher}, class {theirs.index(a)} is {a!r}, of {data.name} it is {b!r}"
    if sorted(theirs) == sorted(ours):
        advice = ""
        if all(map(str.isdecimal, ours)):
            advice = (
                "; folders 000, 001, ... are in the order of their numbers, 0, 1, 10, 2 are not"
            )
        raise FastjacError(
            f"{said}; expected a teacher that was trained on classes in this order{advice}"
        )
    notice(f"{said}: they count as one class, and so do all others of one number")


def find_teacher(options: StudentOptions, data: ImageData) -> tuple[nn.Module, list[str]]:
    """The teacher that the options name, and its classes."""
    source = str(options.teacher)
    if is_library_name(source):
        spec = ModelSpec(source, in_channels=data.channels)
        if (path := options.teacher_weights) is None:
            teacher = create_model(spec, pretrained=True)
        else:
            weights = read_weights(path)
            teacher = create_model(spec)
            head = f".{find_head(teacher)[0]}.weight"
            counts = {len(v) for k, v in weights.items() if f".{k}".endswith(head) and v.dim()}
            # In a file of other names, the library's classes are tried, then those of the data.
            for count in counts if len(counts) == 1 else (None, len(data.classes)):
                try:
                    teacher = create_model(replace(spec, num_classes=count))
                    load_weights(teacher, weights, path, ignore_head=False)
                    break
                except FastjacError:
                    if count is not None:
                        raise
        check_image_size(teacher, data.channels, data.size)
        with torch.no_grad():
            blank = torch.zeros(1, data.channels, data.size, data.size)
            classes = teacher.eval()(blank).shape[1]
        return teacher, [str(k) for k in range(classes)]
    if options.teacher_weights is not None:
        raise FastjacError("--teacher-weights goes with a teacher by name: torchvision/ or timm/")
    trained = load_trained(source)
    try:
        check_image_size(trained.model, data.channels, data.size)
    except FastjacError as error:
        raise FastjacError(
            f"the teacher {source}, trained on {trained.dataset}, does not take the images of "
            f"{data.name}: {error}"
        ) from error
    if trained.size != data.size:
        notice(
            f"the teacher {source} was trained on images of {trained.size} x {trained.size}, and sees "
            f"{data.size} x {data.size} here"
        )
    return trained.model, trained.classes
