"""What the commands take: a dataclass each, whose fields are the flags and the keys of a recipe.

Of the dataclasses in ``TOPICS``, the docstring is the heading above their options in the help.
"""

from __future__ import annotations

import os
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from fastjac.errors import FastjacError, unknown

# The terms of the loss, by the options that weigh them; and those that need a teacher.
TAUGHT = ("activations", "attention", "jacobians", "noisy_activations", "kd", "dkd", "rkd", "hints")
TERMS = ("ce", *TAUGHT, "jacobian_norm")
LIBRARIES = ("torchvision/", "timm/")  # before the names of their networks
# As in fastjac.data and fastjac.models, which import PyTorch.
DATASETS = ("digits", "fashion-mnist", "cifar100", "mit67", "folder")
MODELS = ("vgg4", "vgg9", "vgg")


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class DataOptions:
    """data"""

    config: str | None = _option(
        None, "recipe (digits, fashion-mnist, cifar100, mit67) or YAML file; flags override"
    )
    dataset: str = _option("digits", "digits, fashion-mnist, cifar100, mit67 or folder")
    data_dir: str | None = _option(
        None, "folder of the data set's files; of folder: with train/CLASS/* and val/CLASS/*"
    )
    download: bool = _option(False, "fetch cifar100 or fashion-mnist where it is missing")
    img_size: int | None = _option(
        None, "height and width of the images; default: the data set's, 224 of files"
    )
    augment: bool = _option(False, "random crops and flips of the training images")
    flip: bool = _option(False, "horizontal flips of the training images, without crops")
    input_noise: float = _option(0.0, "standard deviation of noise on the training images")
    skip_damaged: bool = _option(False, "read every image first; leave out and count damaged ones")
    channels: int | None = _option(None, "3: greyscale images as RGB; default: as the images are")
    validation: int | None = _option(
        None, "hold out that many training images and score on them, not on the test images"
    )
    num_classes: int | None = _option(None, "classes to expect; default: as many as there are")
    samples_per_class: int | None = _option(None, "train on that many images of each class")
    workers: int = _option(0, "processes that load images")


@dataclass(kw_only=True)
class _Network:
    """network"""

    model: str = _option("vgg4", "vgg4, vgg9, vgg (with --plan), torchvision/NAME or timm/NAME")
    plan: str | None = _option(None, "layers of the model vgg, such as '16 M 32 M 64 M'")
    width: float = _option(1.0, "factor on the widths of a VGG")
    pretrained: bool = _option(False, "start from the weights of torchvision or timm")
    weights: str | None = _option(
        None, "start from the weights in a .safetensors, .pth, .pt or .npz file"
    )
    ignore_head: bool = _option(False, "--weights: leave out a head for other classes")
    aux_weight: float = _option(
        0.0,
        "weight of cross-entropy at the auxiliary heads of torchvision's GoogLeNet and Inception; 0: "
        "they are left out",
    )


@dataclass(kw_only=True)
class _Optimisation:
    """optimisation"""

    epochs: int = _option(30, "epochs to train")
    epoch_steps: int | None = _option(None, "steps of an epoch; default: one pass over the images")
    batch_size: int = _option(128, "images of a batch; under torchrun, of all processes")
    grad_accum: int = _option(1, "batches of a step, whose mean loss it goes down")
    opt: Literal["adam", "adamw", "sgd"] = _option("adam", "optimiser")
    lr: float = _option(1e-3, "learning rate at the start")
    momentum: float = _option(0.9, "momentum of sgd")
    weight_decay: float = _option(0.0, "weight decay")
    sched: Literal["none", "multistep", "cosine"] = _option("none", "learning rate over the epochs")
    decay_milestones: list[int] = _option([], "multistep: epochs after which the rate drops")
    decay_rate: float = _option(0.1, "multistep: factor of each drop")
    warmup_epochs: int = _option(
        0, "epochs over which the rate rises to --lr, in the place of the first ones of --sched"
    )
    warmup_lr: float = _option(1e-5, "learning rate at the start of --warmup-epochs")
    clip_grad: float | None = _option(None, "scale the gradient down to that norm if it is larger")
    label_smoothing: float = _option(0.0, "share of the label that is spread over all classes")
    mixup: float = _option(
        0.0, "mix the images of a batch in pairs: alpha of the shares, as in timm"
    )
    cutmix: float = _option(
        0.0, "paste a part of one into the other: alpha; with --mixup, half of the batches each"
    )
    model_ema: bool = _option(
        False, "average the weights over the steps; the average is evaluated and exported"
    )
    model_ema_decay: float = _option(
        0.9998,
        "weight of the past in --model-ema; less in the first steps, as timm's warm-up has it",
    )
    seed: int = _option(0, "of weights, batches, augmentation and the subset")


@dataclass(kw_only=True)
class _Machine:
    """precision and device"""

    amp: bool = _option(False, "mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = _option("bfloat16", "type for --amp")
    channels_last: bool = _option(False, "channels-last memory layout")
    micro_batch: int | Literal["auto"] | None = _option(
        None, "images at a time, for the same gradient in less memory; auto: halve when it runs out"
    )
    cuda_graphs: bool = _option(False, "on a GPU: capture a step once, then replay it")
    torchcompile: bool = _option(
        False, "compile the networks; where a term reads a layer, the blocks that it does not touch"
    )
    sync_bn: bool = _option(
        False, "under torchrun: BatchNorm's statistics over the batch of all processes"
    )
    device: str | None = _option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    threads: int | None = _option(None, "CPU threads of the training; default: as torch has it")


@dataclass(kw_only=True)
class _Output:
    """output"""

    output: str = _option("runs", "folder of all experiments")
    experiment: str | None = _option(
        None, "folder of this one; default: command, dataset and model"
    )
    resume: bool = _option(False, "go on where the experiment's last checkpoint is")
    val_interval: int = _option(1, "epochs between evaluations")
    checkpoint_steps: int | None = _option(
        None, "steps between checkpoints; default: one at the end of each epoch alone"
    )
    keep_checkpoints: int = _option(2, "checkpoints to keep: last.pt, last-1.pt, ...")
    tensorboard: bool = _option(False, "write TensorBoard events too")


@dataclass(kw_only=True)
class RunOptions(_Output, _Machine, _Optimisation, _Network, DataOptions):
    """What every run of training takes."""

    def __post_init__(self) -> None:
        _check_values(self)
        _expand_home(self)
        check_dataset(self.dataset)
        if "/" not in self.model and self.model not in MODELS:
            known = [*MODELS, f"torchvision/{self.model}", f"timm/{self.model}"]
            raise unknown("model", self.model, known)
        positive = ["epochs", "batch_size", "lr", "width", "decay_rate", "val_interval"]
        positive += ["img_size", "channels", "validation", "num_classes", "samples_per_class"]
        positive += ["epoch_steps", "threads"]
        positive += ["grad_accum", "clip_grad", "checkpoint_steps", "keep_checkpoints"]
        _check_more_than_zero(self, positive)
        not_negative = ["workers", "weight_decay", "momentum", "seed", "warmup_epochs", "warmup_lr"]
        _check_not_negative(self, [*not_negative, "mixup", "cutmix", "aux_weight", "input_noise"])
        if bool(self.decay_milestones) != (self.sched == "multistep"):
            raise FastjacError("--decay-milestones goes with --sched multistep, and only with it")
        if sorted({0, *self.decay_milestones}) != [0, *self.decay_milestones]:
            raise FastjacError(
                "--decay-milestones: expected epochs from 1 on, each once, in their order; got "
                + " ".join(map(str, self.decay_milestones))
            )
        self._check_optimisation()
        if self.pretrained and self.weights:
            raise FastjacError("--pretrained and --weights: give one of them")
        if self.aux_weight and self.pretrained:
            raise FastjacError(
                "--aux-weight does not go with --pretrained, whose heads are absent or of other classes"
            )
        if self.ignore_head and not self.weights:
            raise FastjacError("--ignore-head goes with --weights")
        if self.cuda_graphs and self.torchcompile:
            raise FastjacError("--cuda-graphs and --torchcompile: give one of them")
        if self.cuda_graphs and self.amp and self.amp_dtype == "float16":
            raise FastjacError(
                "--cuda-graphs does not go with --amp-dtype float16, whose loss scale is read on the "
                "host; expected bfloat16"
            )
        if self.cuda_graphs and (self.micro_batch or self.grad_accum > 1):
            raise FastjacError(
                "--cuda-graphs replays a step on one batch: it does not go with --micro-batch or "
                "--grad-accum"
            )

    def _check_optimisation(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise FastjacError(
                f"--warmup-epochs: expected fewer than the {self.epochs} --epochs, got "
                f"{self.warmup_epochs}"
            )
        for name, needed in (("warmup_lr", "warmup_epochs"), ("model_ema_decay", "model_ema")):
            default = self.__dataclass_fields__[name].default
            if getattr(self, name) != default and not getattr(self, needed):
                raise FastjacError(f"{flag(name)} goes with {flag(needed)}")
        if not 0 < self.model_ema_decay < 1:
            raise FastjacError(
                f"--model-ema-decay: expected between 0 and 1, got {self.model_ema_decay}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise FastjacError(
                f"--label-smoothing: expected 0 or more and less than 1, got {self.label_smoothing}"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise FastjacError(
                "--mixup and --cutmix mix the images of a batch in pairs; expected an even "
                f"--batch-size, got {self.batch_size}"
            )
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise FastjacError(
                f"--micro-batch: expected auto or more than 0, got {self.micro_batch}"
            )


@dataclass(kw_only=True)
class TeacherOptions(RunOptions):
    """Train a network with cross-entropy."""

    example: ClassVar[str] = "teacher --epochs 5"


@dataclass(kw_only=True)
class _Terms:
    """the teacher and the terms of the loss"""

    teacher: str | None = _option(
        None, "its run folder, checkpoint or model.safetensors; or torchvision/NAME, timm/NAME"
    )
    teacher_weights: str | None = _option(
        None,
        "weights for a teacher given by name, of any classes; default: its library's pretrained ones",
    )
    unlabelled: str | None = _option(
        None, "folder of further training images, without labels, for the terms that take a teacher"
    )
    ce: float = _option(1.0, "weight of cross-entropy with the labels")
    activations: float = _option(0.0, "weight of the squared error of the logits")
    attention: float = _option(0.0, "weight of the distance of the attention maps")
    noisy_activations: float = _option(
        0.0, "weight of the squared error of the logits at noisy images (one more forward of each)"
    )
    noise: float = _option(0.1, "noisy-activations: standard deviation of the noise")
    kd: float = _option(0.0, "weight of the divergence of the softened probabilities")
    dkd: float = _option(0.0, "weight of decoupled distillation (CVPR 2022)")
    temperature: float = _option(4.0, "kd and dkd: temperature")
    rkd: float = _option(0.0, "weight of relational distillation (needs torchdistill)")
    hints: float = _option(0.0, "weight of the squared error of the features, through a 1x1 conv")
    teacher_cache: str = _option(
        "auto",
        "keep what the teacher gives for an image: in memory (auto), not (off), or in files of a "
        "folder",
    )


@dataclass(kw_only=True)
class _JacobianTerm:
    """the Jacobian term"""

    jacobians: float = _option(0.0, "weight of the distance of the input Jacobians")
    jacobian_norm: float = _option(
        0.0,
        "weight of the student's squared Jacobian norm; with --mixup and --cutmix, of the class with "
        "most weight",
    )
    target: Literal["label-logit", "attention-window", "logits", "projection", "cross-entropy"] = (
        _option("label-logit", "the scalar (or scalars) whose Jacobian is taken")
    )
    projections: int = _option(1, "projection: random projections of the logits")
    level: int = _option(1, "feature level of the attention map")
    levels: list[int] = _option([], "several feature levels at once, in place of --level")
    layer: str | None = _option(None, "layer of the student, in place of --level")
    teacher_layer: str | None = _option(None, "layer of the teacher, in place of --level")
    window: float = _option(0.2, "side of the attention window, as a share of the map's height")
    power: float = _option(2.0, "power of the features in the attention map")
    anchor: Literal["teacher", "own"] = _option("teacher", "whose brightest window is taken")
    normalize: bool | None = _option(
        None, "scale the Jacobians to unit norm; default: for attention-window only"
    )
    batch_stats: Literal["frozen", "batch"] = _option(
        "frozen", "BatchNorm's batch statistics in the Jacobian: constants, or differentiated"
    )
    strategy: Literal["auto", "local", "dense", "autograd"] = _option(
        "auto", "how the Jacobian term is computed"
    )


@dataclass(kw_only=True)
class StudentOptions(_JacobianTerm, _Terms, RunOptions):
    """Train a student: distil a teacher into it, or penalise its Jacobian."""

    example: ClassVar[str] = (
        "student --teacher runs/teacher-digits-vgg4 --jacobians 0.1 --samples-per-class 5 "
        "--epochs 5 --epoch-steps 40"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_negative(self, [*TERMS, "noise"])
        _check_more_than_zero(self, ["temperature", "projections"])
        if self.levels and (self.layer or self.teacher_layer):
            raise FastjacError("--levels and --layer or --teacher-layer: give one of them")
        self._check_terms()

    def _check_terms(self) -> None:
        reads = [name for name in ("attention", "hints") if getattr(self, name)]
        window = self.target == "attention-window"
        of_jacobians = [name for name in ("jacobians", "jacobian_norm") if getattr(self, name)]
        if self.torchcompile and of_jacobians and not window:
            raise FastjacError(
                f"--torchcompile does not go with {flag(of_jacobians[0])} of --target {self.target}, a "
                "Jacobian of the whole network; with --target attention-window it compiles what lies "
                "behind the layer"
            )
        if of_jacobians and reads and not window:
            raise FastjacError(
                f"{flag(reads[0])} with {flag(of_jacobians[0])} needs --target attention-window: both "
                "terms are taken at one layer"
            )
        if self.jacobians and self.jacobian_norm:
            raise FastjacError("--jacobians and --jacobian-norm: give one of them")
        self._check_unlabelled()
        if self.teacher_cache not in ("auto", "off") and (reason := self.uncacheable()):
            raise FastjacError(f"--teacher-cache {self.teacher_cache}: {reason}")

    def _check_unlabelled(self) -> None:
        if self.unlabelled is None:
            return
        if not any(getattr(self, term) for term in TAUGHT):
            raise _no_teacher()
        for name in ("mixup", "cutmix", "label_smoothing"):
            if getattr(self, name):
                raise FastjacError(
                    f"--unlabelled does not go with {flag(name)}, which needs labels"
                )

    def uncacheable(self) -> str:
        """Why what the teacher gives cannot be kept from step to step; empty if it can."""
        if self.target == "projection" and self.jacobians:
            return "--target projection draws random numbers at each step"
        if self.hints:
            return "--hints takes whole feature maps"
        if self.augment:
            return "with --augment hardly an image comes twice"
        if self.mixup or self.cutmix:
            return "with --mixup and --cutmix hardly an image comes twice"
        if self.input_noise:
            return "with --input-noise no image comes twice"
        if self.amp:
            return "the teacher's mixed precision is not kept; leave out --amp"
        if self.cuda_graphs:
            return "a CUDA graph cannot look images up; leave out --cuda-graphs"
        return ""


@dataclass(kw_only=True)
class _Table:
    """the table"""

    methods: list[str] = _option(
        ["ce", "ce+activations", "ce+jacobians", "ce+activations+jacobians"],
        "sums of terms, each at its weight",
    )
    rows: dict[str, dict[str, Any]] = _option(
        {}, "further rows, in a recipe: a name, and the options that make it; other terms are off"
    )
    samples: list[int] = _option([1, 2, 5, 10, 20], "images per class; 0: all")
    seeds: list[int] = _option([0, 1, 2, 3, 4], "seeds of the students")
    fewer_seeds: int | None = _option(None, "seeds where there are more than 10 images per class")
    test_noise: list[float] = _option(
        [], "score under Gaussian noise of these standard deviations too, a column each"
    )
    title: str | None = _option(None, "heading of the report")
    jobs: int | None = _option(None, "students at a time; default: one per CPU, or 1 on a GPU")


# What a row of a table may not set: it is the table's, or says where and how.
_NOT_OF_A_ROW = {
    "seed", "samples_per_class", "output", "experiment", "resume", "config", "dataset", "data_dir",
    "download", "num_classes", "validation",
}  # fmt: skip


@dataclass(kw_only=True)
class TableOptions(_Table, StudentOptions):
    """Train students by several methods on few images, over several seeds."""

    example: ClassVar[str] = (
        "table --config digits --methods ce ce+jacobians --samples 1 5 --seeds 0 1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("jobs", "fewer_seeds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise FastjacError(f"{flag(name)}: expected at least 1, got {value}")
        for name in ("methods", "samples", "seeds", "test_noise"):
            values = getattr(self, name)
            empty = not values and not (name == "test_noise" or (name == "methods" and self.rows))
            if empty or len(set(values)) != len(values):
                raise FastjacError(f"{flag(name)}: expected different values, got {values}")
        if min(self.seeds) < 0:
            raise FastjacError(f"--seeds: expected 0 or more, got {min(self.seeds)}")
        if min(self.samples) < 0:
            raise FastjacError(f"--samples: expected 0 (all) or more, got {min(self.samples)}")
        if self.test_noise and not min(self.test_noise) >= 0:
            raise FastjacError(f"--test-noise: expected 0 or more, got {min(self.test_noise)}")
        rows = self.contenders().values()
        if self.unlabelled and not any(row.get("unlabelled", True) for row in rows):
            raise _no_teacher()

    def _check_unlabelled(self) -> None:
        """Nothing: rows have terms of their own."""

    def contenders(self) -> dict[str, dict[str, Any]]:
        """For each row of the table, the options that differ from the table's."""
        rows = {method: _images_of(self.terms(method)) for method in self.methods}
        for name, given in self.rows.items():
            if name in rows:
                raise FastjacError(f"--rows: {name!r} stands there twice")
            rows[name] = self._row(name, given)
        return rows

    def terms(self, method: str) -> dict[str, Any]:
        """The weight of every term in ``method``."""
        chosen = [term.replace("-", "_") for term in method.split("+")]
        for term in chosen:
            if term not in TERMS:
                raise unknown("term", term, map(_dashed, TERMS), f"method {method!r}")
            if getattr(self, term) == 0:
                raise FastjacError(
                    f"method {method!r}: the weight {flag(term)} is 0; give it one, or leave the method "
                    "out of --methods"
                )
        return {term: getattr(self, term) if term in chosen else 0.0 for term in TERMS}

    def _row(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        known = [n for n in names(StudentOptions) if n not in _NOT_OF_A_ROW]
        values = {str(key).replace("-", "_"): value for key, value in given.items()}
        for key in values:
            if key not in known:
                raise unknown("option", _dashed(key), map(_dashed, known), f"row {name!r}")
        if len(values) < len(given):
            raise FastjacError(f"row {name!r}: an option stands there twice, with - and with _")
        row = _images_of({term: self.ce if term == "ce" else 0.0 for term in TERMS} | values)
        own = {n: getattr(self, n) for n in names(StudentOptions)}
        try:
            StudentOptions(**own | row)
        except (FastjacError, TypeError) as error:
            raise FastjacError(f"row {name!r}: {error}") from error
        return row


def _images_of(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row that takes no teacher, without the images that have no label."""
    return row if any(row[term] for term in TAUGHT) else {"unlabelled": None} | row


def _no_teacher() -> FastjacError:
    return FastjacError(
        "--unlabelled: nothing can be learnt from images without labels but from a teacher; expected "
        f"--teacher and one of {', '.join(map(flag, TAUGHT))}"
    )


@dataclass(kw_only=True)
class DemoOptions(TableOptions):
    """The recipe ``digits``: a teacher, a hundred students, a table and two pictures."""

    example: ClassVar[str] = "demo --samples 1 20 --seeds 0 1 --experiment short"

    config: str | None = _option("digits", "recipe or YAML file; flags override")
    experiment: str | None = _option("demo", "folder of this one")


@dataclass(kw_only=True)
class EvaluateOptions:
    """Score a trained network on the test images."""

    example: ClassVar[str] = "evaluate runs/teacher-digits-vgg4"

    checkpoint: str = _option(MISSING, "run folder, last.pt, best.pt or model.safetensors")
    dataset: str | None = _option(None, "default: the one that it was trained on")
    data_dir: str | None = _option(
        None, "folder of the data set's files; of folder: with train/CLASS/* and val/CLASS/*"
    )
    download: bool = _option(False, "fetch cifar100 or fashion-mnist where it is missing")
    skip_damaged: bool = _option(False, "read every image first; leave out and count damaged ones")
    batch_size: int = _option(256, "images at a time")
    workers: int = _option(0, "processes that load images")
    device: str | None = _option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one")

    def __post_init__(self) -> None:
        _check_values(self)
        _expand_home(self)
        _check_more_than_zero(self, ["batch_size"])
        _check_not_negative(self, ["workers"])
        if self.dataset is not None:
            check_dataset(self.dataset)


# In the order of the help.
TOPICS = (DataOptions, _Network, _Optimisation, _Terms, _JacobianTerm, _Table, _Machine, _Output)


# The most that a number may be; of others, what PyTorch takes.
_MOST = {"threads": 1024, "workers": 1024, "jobs": 1024}
_MOST |= {"img_size": 2**16, "width": 10**6, "grad_accum": 10**9}
_MOST_FLOAT = 3.4e38  # of float32


def _check_values(options: Any) -> None:
    """Raise for what is absent, empty texts or not UTF-8, and numbers that are infinite or too large."""
    hints = get_type_hints(type(options))
    for name in names(type(options)):
        given, most = getattr(options, name), _MOST.get(name, 2**63 - 1)
        if given is None and NoneType not in get_args(hints[name]):
            raise FastjacError(f"{flag(name)}: expected a value, got null")
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and not value:
                raise FastjacError(f"{flag(name)}: expected a text, got an empty one")
            if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
                raise FastjacError(f"{flag(name)}: expected text in UTF-8, got {value!a}")
            if isinstance(value, str) and "\0" in value:
                raise FastjacError(f"{flag(name)}: expected text without null bytes, got {value!a}")
            if isinstance(value, float) and not abs(value) <= _MOST_FLOAT:
                raise FastjacError(
                    f"{flag(name)}: expected a finite number, up to {_MOST_FLOAT}; got {value}"
                )
            if (isinstance(value, int) or name in _MOST) and value is not None and value > most:
                raise FastjacError(f"{flag(name)}: expected at most {most}, got {value}")


_PATHS = {
    "data_dir", "weights", "teacher", "teacher_weights", "teacher_cache", "unlabelled", "output",
    "checkpoint",
}  # fmt: skip


def _expand_home(options: Any) -> None:
    """Read ~ in a path as a shell does, which does not see it in --output=~/runs or a recipe."""
    for name in _PATHS.intersection(names(type(options))):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, os.path.expanduser(path))


def _check_more_than_zero(options: Any, these: list[str]) -> None:
    for name in these:
        if (value := getattr(options, name)) is not None and not value > 0:
            raise FastjacError(f"{flag(name)}: expected more than 0, got {value}")


def _check_not_negative(options: Any, these: list[str]) -> None:
    for name in these:
        if not (value := getattr(options, name)) >= 0:
            raise FastjacError(f"{flag(name)}: expected 0 or more, got {value}")


def check_dataset(name: str) -> None:
    """Raises for an unknown data set."""
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + _dashed(name)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def names(cls: type) -> list[str]:
    """The fields of an options class."""
    return [f.name for f in fields(cls)]
