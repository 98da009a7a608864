"""What a run is made of, from its options; whatever is wrong with them is found here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastjac.data import ImageData, add_unlabelled, evaluation_transform, load_data
from fastjac.errors import FastjacError, first_line, is_file, notice
from fastjac.models import (
    ModelSpec,
    check_image_size,
    create_model,
    load_weights,
    read_weights,
)
from fastjac.models.weights import read_checkpoint
from fastjac.train import ranks
from fastjac.train.files import read_json
from fastjac.train.options import RunOptions
from fastjac.train.sources import find_trained, is_library_name


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default a GPU where there is one, of its own for each process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if (local := ranks.local_rank()) is not None and name.startswith("cuda"):
        if name != "cuda":
            raise FastjacError(f"--device {name}: each process takes its own GPU; expected cuda")
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        torch.get_device_module(device)  # of "meta", whose tensors hold nothing, there is none
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).partition(". ")[0]  # behind it, all that PyTorch has
        raise FastjacError(f"--device {name} is not to be had: {reason}") from error
    return device


def build_data(options: RunOptions, unlabelled: str | None = None) -> ImageData:
    """The data set, with as many classes as the options expect, and the images in ``unlabelled``."""
    data = load_data(
        options.dataset,
        options.data_dir,
        options.img_size,
        options.augment,
        options.download,
        options.skip_damaged,
        options.channels,
        options.validation,
        options.flip,
    )
    if options.num_classes not in (None, len(data.classes)):
        raise FastjacError(
            f"--num-classes {options.num_classes}: {data.name} has {len(data.classes)} classes"
        )
    if len(data.classes) < 2:
        raise FastjacError(
            f"{data.name}: {options.data_dir} has one class, {data.classes[0]!r}; expected two or more"
        )
    if unlabelled is None:
        return data
    try:
        return add_unlabelled(data, unlabelled, options.skip_damaged)
    except FastjacError as error:
        raise FastjacError(f"--unlabelled: {error}") from error


def build_model(options: RunOptions, data: ImageData) -> tuple[nn.Module, ModelSpec]:
    """The network to train, and the spec that builds it again.

    The pixels are normalised as the data set's; those of a library's network with weights, as the
    library has it, unless the file of weights says otherwise.
    """
    as_library = options.weights is not None and is_library_name(options.model)
    own = options.pretrained or (as_library and data.channels == 3)
    spec = ModelSpec(
        options.model,
        len(data.classes),
        data.channels,
        options.width,
        options.plan,
        None if own else data.mean,
        None if own else data.std,
    )
    model = create_model(spec, options.pretrained, options.aux_weight > 0)
    check_image_size(model, data.channels, data.size)
    if options.weights is not None:
        weights = read_weights(options.weights)
        load_weights(model, weights, options.weights, options.ignore_head)
    mean, std = model.normalize.mean.flatten().tolist(), model.normalize.std.flatten().tolist()
    return model, replace(spec, mean=tuple(mean), std=tuple(std))


@dataclass(frozen=True)
class Trained:
    """A network that the trainer has made, and what it was trained for.

    Attributes:
        model: takes images ``[B, C, size, size]`` float32 in [0, 1], which it normalises itself, and
            gives logits ``[B, len(classes)]``. On the CPU, in train mode.
        spec: builds a network of the kind again.
        dataset: name of the data set.
        size: height and width of its images.
        classes: their names, in the order of the logits.
        source: the file of the weights.
    """

    model: nn.Module
    spec: ModelSpec
    dataset: str
    size: int
    classes: list[str]
    source: Path

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """Makes ``[C, size, size]`` of an image in RGB, as the test images were cut to size."""
        return evaluation_transform(self.dataset, self.size, self.spec.in_channels)


def load_trained(source: str | Path) -> Trained:
    """The network in a run's folder, a checkpoint (``.pt``), or a ``model.safetensors``.

    Raises :class:`FastjacError` for what is not of a run, for a file that is damaged, and for weights
    that are not the network's, each by name. docs/own_images.md has a program that uses one.
    """
    path = find_trained(source)
    if path.name == "last.pt" and path != Path(source):
        notice(f"{source} is not finished: its last checkpoint is taken")
    if path.suffix == ".safetensors":
        said = path.with_name("config.json")
        if not is_file(said):
            raise FastjacError(
                f"{said} is missing, which says what network {path.name} is of{_ELSEWHERE}"
            )
        about = read_json(said)
    else:
        said, about = path, read_checkpoint(path).get("about")
        if about is None:
            raise FastjacError(f"{path} does not say what network it is of{_ELSEWHERE}")
    try:
        spec = ModelSpec(**about["spec"])
        dataset, size, classes = about["dataset"], about["size"], about["classes"]
        _check_kinds(spec, dataset, size, classes)
        model = create_model(spec)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FastjacError):
            raise FastjacError(f"{said}: {error}") from error
        missing = "there is no " if isinstance(error, KeyError) else ""
        raise FastjacError(
            f"{said} does not say what network it is of: {missing}{first_line(error)}; expected a run's"
        ) from error
    load_weights(model, read_weights(path), path, ignore_head=False)
    return Trained(model, spec, dataset, size, classes, path)


_ELSEWHERE = (
    "; weights from elsewhere are read by --weights, and a teacher's by --teacher-weights with its "
    "name as --teacher"
)


def _check_kinds(spec: ModelSpec, dataset: Any, size: Any, classes: Any) -> None:
    """Raise a TypeError for what :func:`describe` does not give: a file may have been edited by hand."""
    pixels = [] if spec.mean is None and spec.std is None else [spec.mean, spec.std]
    for name, value, kind, right in (
        ("model", spec.model, "a name", isinstance(spec.model, str)),
        ("num_classes", spec.num_classes, "a number from 1 on", _is_count(spec.num_classes)),
        ("in_channels", spec.in_channels, "a number from 1 on", _is_count(spec.in_channels)),
        ("width", spec.width, "a number", isinstance(spec.width, int | float) and spec.width > 0),
        ("plan", spec.plan, "a text or nothing", isinstance(spec.plan, str | None)),
        ("dataset", dataset, "a name", isinstance(dataset, str)),
        ("size", size, "a number from 1 on", _is_count(size)),
        ("classes", classes, "a list", isinstance(classes, list)),
        *(
            (
                "mean or std",
                each,
                f"{spec.in_channels} numbers",
                _are_numbers(each, spec.in_channels),
            )
            for each in pixels
        ),
    ):
        if not right:
            raise TypeError(f"{name} is {value!r}, not {kind}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(value, int | float) for value in values)
    )


def describe(spec: ModelSpec, data: ImageData) -> dict[str, Any]:
    """What :func:`load_trained` needs beside the weights; goes into checkpoints and config.json."""
    return {
        "spec": asdict(spec),
        "dataset": data.name,
        "size": data.size,
        "classes": list(data.classes),
    }


def build_optimizer(options: RunOptions, model: nn.Module) -> Optimizer:
    """The optimiser over all parameters of ``model``.

    For ``cuda_graphs`` its learning rate and counters are tensors on the GPU, where a replay reads them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr: float | Tensor = options.lr
    sgd, adam = {}, {"foreach": True}
    if options.cuda_graphs:
        lr = torch.tensor(options.lr, device=parameters[0].device)
        sgd["fused"] = adam["capturable"] = True
    if options.opt == "sgd":
        return torch.optim.SGD(
            parameters, lr, options.momentum, weight_decay=options.weight_decay, **sgd
        )
    kind = torch.optim.Adam if options.opt == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=options.weight_decay, **adam)


def lr_factor(options: RunOptions, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step.

    As timm's CosineLRScheduler and MultiStepLRScheduler have it, by steps; those replace the rate by a
    number, which a CUDA graph would not see.
    """
    warmup = options.warmup_epochs * steps_per_epoch
    start = options.warmup_lr / options.lr

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * step / warmup
        if options.sched == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / (options.epochs * steps_per_epoch)))
        done = step // steps_per_epoch
        return options.decay_rate ** sum(done >= m for m in options.decay_milestones)

    return factor


def build_average(options: RunOptions, model: nn.Module) -> nn.Module | None:
    """The moving average of the weights of ``model``, where the options want one."""
    if not options.model_ema:
        return None
    from timm.utils import ModelEmaV3  # seconds to import

    return ModelEmaV3(model, options.model_ema_decay, use_warmup=True)
