"""A network from its name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastjac.errors import FastjacError, notice, unknown
from fastjac.models.normalize import normalized
from fastjac.models.vgg import PLANS, VGG

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSpec:
    """All it takes to build a network again.

    Attributes:
        model: ``vgg4``, ``vgg9``, ``vgg`` (by ``plan``), ``torchvision/<name>`` or ``timm/<name>``.
        num_classes: logits; None: as the library has it (1000, mostly).
        in_channels: channels of the image; torchvision's networks take 3.
        width: factor on the widths, for a VGG.
        plan: the layers, for ``vgg``.
        mean, std: of the pixels, per channel; None: those the pretrained weights were trained with,
            else 0 and 1 (a VGG) or ImageNet's.
    """

    model: str
    num_classes: int | None = None
    in_channels: int = 3
    width: float = 1.0
    plan: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def create_model(spec: ModelSpec, pretrained: bool = False, auxiliary: bool = False) -> nn.Module:
    """The network of ``spec``: raw pixels in [0, 1] in, logits out.

    Its weights are random, from torch's global generator, unless ``pretrained``: those come from
    the library that has the network, and where its class count differs from ``spec.num_classes``,
    the last layer is new. torchvision's GoogLeNet and Inception come without the auxiliary heads
    that only their training has, with a notice; with ``auxiliary`` they have them, and return the
    logits alone all the same (hooks see what the heads give). Raises for an unknown name (with the
    nearest), and for what the named network cannot do.
    """
    library, _, name = spec.model.rpartition("/")
    if library not in _BUILDERS:
        raise unknown("model", spec.model, [*PLANS, "vgg", "torchvision/resnet18", "timm/resnet18"])
    if library and (spec.plan is not None or spec.width != 1):
        raise FastjacError(f"{spec.model}: plan and width are for vgg, vgg4 and vgg9")
    net = _BUILDERS[library](name, spec, pretrained)
    heads = auxiliary_heads(net)
    if heads:
        net.aux_logits = False  # no tuple of outputs
    if auxiliary and not heads:
        raise FastjacError(f"{spec.model} has no auxiliary heads (--aux-weight)")
    if heads and not auxiliary:
        notice(f"{spec.model} is built without its auxiliary heads")
        for head in heads:
            setattr(net, head, None)
    return net


def auxiliary_heads(net: nn.Module) -> list[str]:
    """The names of the classifiers that ``net`` has for its training alone."""
    names = ("aux1", "aux2", "AuxLogits")
    return [name for name in names if isinstance(getattr(net, name, None), nn.Module)]


def _vgg(name: str, spec: ModelSpec, pretrained: bool) -> nn.Module:
    if name not in PLANS and name != "vgg":
        known = [*PLANS, "vgg", f"torchvision/{name}", f"timm/{name}"]
        raise unknown("model", name, known)
    if pretrained:
        raise FastjacError(f"{name} has no pretrained weights; give a file of weights instead")
    if (name == "vgg") != (spec.plan is not None):
        raise FastjacError(
            f"{name}: a plan such as {PLANS['vgg4']!r} goes with the model 'vgg', and only with it"
        )
    if spec.num_classes is None:
        raise FastjacError(f"{name}: num_classes is missing")
    plan = PLANS[name] if spec.plan is None else spec.plan
    return VGG(plan, spec.num_classes, spec.in_channels, spec.width, spec.mean, spec.std)


def _torchvision(name: str, spec: ModelSpec, pretrained: bool) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise unknown("model", spec.model, [f"torchvision/{k}" for k in known])
    if spec.in_channels != 3:
        raise FastjacError(
            f"{spec.model} takes 3 channels, the images have {spec.in_channels}; "
            f"timm's networks take any"
        )
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        preset = weights.transforms()
        mean, std = getattr(preset, "mean", mean), getattr(preset, "std", std)
        net = _downloaded(spec, lambda: torchvision.models.get_model(name, weights=weights))
        if spec.num_classes is not None:
            _fit_head(net, spec)
    else:
        classes = {} if spec.num_classes is None else {"num_classes": spec.num_classes}
        net = torchvision.models.get_model(name, weights=None, **classes)
    return normalized(net, spec.mean or mean, spec.std or std)


def _timm(name: str, spec: ModelSpec, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise unknown("model", spec.model, [f"timm/{k}" for k in timm.list_models()])
    options = {"in_chans": spec.in_channels}
    if spec.num_classes is not None:
        options["num_classes"] = spec.num_classes
    net = _downloaded(spec, lambda: timm.create_model(name, pretrained=pretrained, **options))
    own = getattr(net, "pretrained_cfg", {})
    mean, std = own.get("mean", IMAGENET_MEAN), own.get("std", IMAGENET_STD)
    if spec.in_channels != len(mean):
        mean, std = (0.0,) * spec.in_channels, (1.0,) * spec.in_channels
    return normalized(net, spec.mean or mean, spec.std or std)


_BUILDERS = {"": _vgg, "torchvision": _torchvision, "timm": _timm}


def _downloaded(spec: ModelSpec, build):
    """``build()``, where a download that fails is the user's news and not a bug."""
    try:
        return build()
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and "pretrained" not in str(error).lower():
            raise
        raise FastjacError(
            f"{spec.model}: its pretrained weights could not be fetched "
            f"({str(error).strip().splitlines()[0]}); give a file of weights instead"
        ) from error


def find_head(net: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module of the last layer, which gives the logits."""
    layers = [m for m in net.named_modules() if isinstance(m[1], nn.Linear | nn.Conv2d)]
    return layers[-1] if layers else ("", net)


def _fit_head(net: nn.Module, spec: ModelSpec) -> None:
    """Give ``net`` a new last layer where its class count is not the wanted one."""
    name, head = find_head(net)
    parent = net.get_submodule(name.rpartition(".")[0])
    if isinstance(head, nn.Linear) and head.out_features != spec.num_classes:
        new: nn.Module = nn.Linear(head.in_features, spec.num_classes)
    elif isinstance(head, nn.Conv2d) and head.out_channels != spec.num_classes:
        new = nn.Conv2d(head.in_channels, spec.num_classes, head.kernel_size)
    else:
        return
    setattr(parent, name.rpartition(".")[2], new)


def check_image_size(model: nn.Module, channels: int, size: int) -> None:
    """Raise unless ``model`` takes ``[B, channels, size, size]`` and gives logits ``[B, classes]``.

    A VGG is asked by arithmetic; any other network is run once, in eval mode, on two blank images.
    """
    images = f"{channels} x {size} x {size} images"
    if isinstance(model, VGG):
        if size < model.smallest_image:
            pools = model.smallest_image.bit_length() - 1
            raise FastjacError(
                f"{images} are too small: the {pools} max-pools of this VGG need at least "
                f"{model.smallest_image} x {model.smallest_image}"
            )
        if channels != model.conv1.in_channels:
            raise FastjacError(f"{images}: this VGG takes {model.conv1.in_channels} channels")
        return
    name, mode = type(model).__name__, model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, channels, size, size))
    except (RuntimeError, AssertionError) as error:
        raise FastjacError(
            f"{name} cannot take {images}: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        model.train(mode)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise FastjacError(f"{name} does not return logits [B, classes]")
